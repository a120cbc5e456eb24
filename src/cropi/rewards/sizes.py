"""How large the value of an expression may be, found without working it out."""

from __future__ import annotations

import math
from typing import Any

DIGITS = 20_000  # to work out, at the most
NESTED = 5  # functions of functions


def too_large(expression: Any) -> bool:
    """Whether working it out could take longer than an answer is worth."""
    return _digits(expression, 1.0, 0) > DIGITS


def _digits(node: Any, of_symbol: float, depth: int) -> float:
    """A bound on the digits of a value where symbols have so many."""
    from sympy import Add, Function, MatrixBase, Pow, Product, Rational, Sum, Symbol, exp, factorial

    if isinstance(node, Rational | Symbol):
        return of_symbol if isinstance(node, Symbol) else math.log10(max(abs(node.p), node.q))
    parts = list(node) if isinstance(node, MatrixBase) else list(getattr(node, "args", ()))
    depth += isinstance(node, Function)
    limits = max((_digits(part, 0.0, depth) for part in parts[1:]), default=0.0)
    worked_out = isinstance(node, Sum | Product)
    sizes = [_digits(part, max(of_symbol, limits) if worked_out else of_symbol, depth) for part in parts] or [1.0]
    if depth > NESTED or max(sizes) == math.inf:
        return math.inf
    if not isinstance(node, Sum | Product | Pow | factorial | exp):
        return sum(sizes)
    times = limits if worked_out else sizes[-1]  # digits of how many times something is multiplied or added
    if times > math.log10(DIGITS) + 1:
        return math.inf
    if isinstance(node, Pow) and isinstance(node.base, Add) and node.base.free_symbols:
        return float(100 * 10 ** (times * (len(node.base.args) - 1)))  # for the terms of its expansion
    return float(10**times * (times + 0.5 if isinstance(node, factorial | exp) else max(sizes[0], 0.3)))
