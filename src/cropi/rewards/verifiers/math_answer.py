r"""The verifier `math`: answers in LaTeX or plain writing, compared by meaning with math-verify.

An answer is words alone, or values with units. The library gets one short expression without text. Verdicts are checked
again where the library is known to be too kind. In its issue tracker (github.com/huggingface/Math-Verify): numbers near
zero are rounded to the same (#14), equations that say nothing equal each other (#60), and 2 2/3 is one (#81).
"""

from __future__ import annotations

import logging
import math
import re
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

from cropi.rewards.verifier import CORRECT, UNPARSEABLE_ANSWER, UNPARSEABLE_GOLD, WRONG, Answered, VerifierTable, Verify
from cropi.rewards.verifiers.boxed import in_box, plain_latex
from cropi.rewards.verifiers.math_reading import PERCENT, Answer, answer_text, bare, read
from cropi.rewards.verifiers.numeric import value_of

MAX_LENGTH = 1000  # characters of an answer; a longer one is no answer
MAX_DIGITS = 20_000  # of a value to work out
MAX_NESTED = 5  # functions of functions
RELATIVE = 2e-6  # numbers of which one is a decimal are equal up to this share of the larger
_APART = re.compile(r"(?<!_)\d\s+\d")  # two numbers side by side are neither a product nor a sum
_DEPTH = 10  # of brackets: the library's time grows exponentially with it
_DIGITS = re.compile(r"\d{40}")
_IMAGINARY = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")
_INDEX = re.compile(r"_{?i|\\(?:sum|prod)")
_BASE = re.compile(r"(?<=\d)\s*_\s*(?:{[^{}]*}|\w)")


class MathVerifier(VerifierTable):
    r"""Right when the last `\boxed{...}`, or the announced answer, means the recorded answer, by math-verify."""

    type: Literal["math"]
    boxed_only: bool = False
    r"""Accept only a `\boxed{...}` as an answer, not what follows the last `####`, `answer is` or `answer:`."""

    def load(self) -> Verify:
        try:
            import math_verify  # noqa: F401
        except ImportError:
            raise ImportError("the verifier `math` needs math-verify: pip install 'cropi[math]'") from None
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # else it warns that it has no time limit
        return self._judge

    def _judge(self, row: Answered) -> str:
        gold = answer_text(row.answer, boxed_only=False)
        gold = gold if gold is not None else bare(row.answer)
        if not gold or len(gold) > MAX_LENGTH:
            return UNPARSEABLE_GOLD
        given = answer_text(row.completion, boxed_only=self.boxed_only)
        if not given or len(given) > MAX_LENGTH:
            return UNPARSEABLE_ANSWER
        return compare(gold, given)

    def completion_with(self, answer: str) -> str:
        return in_box(answer)


def compare(gold: str, given: str) -> str:
    """Compare two answers, each one expression. Whether the gold answer is readable depends on it alone."""
    one, other = read(gold), read(given)
    if not _readable(one):
        return UNPARSEABLE_GOLD
    text = one.is_text or other.is_text
    alike = one.words and one.words == other.words and (text or max(map(len, one.words)) == 1)
    if alike or one.written == other.written:
        return CORRECT
    if text:
        return WRONG if other.words is not None or not other.is_text else UNPARSEABLE_ANSWER
    if not _readable(other):
        return UNPARSEABLE_ANSWER
    if len(one.values) != len(other.values) or (one.units and other.units and one.units != other.units):
        return WRONG
    same = all(map(_same, one.values, other.values))
    if not same and {PERCENT} == {*one.units, *other.units} and one.units != other.units:  # 50% is 50, and 0.5
        first, second = (
            f"\\frac{{{side.values[0]}}}{{100}}" if side.units else side.values[0] for side in (one, other)
        )
        same = _same(first, second)
    return CORRECT if same else WRONG


def _readable(answer: Answer) -> bool:
    return answer.is_text or all(value_of(value) is not None or _parsed(value) is not None for value in answer.values)


def _same(gold: str, given: str) -> bool:
    """Whether two expressions are equal, also in what the library ignores: bases, repetition, kinds of brackets."""
    expected, number = value_of(gold), value_of(given)
    if expected is not None and number is not None:
        exact = not re.search(r"[.eE]", gold + given)
        return expected == number or (not exact and bool(_close(expected, number, RELATIVE)))
    if _BASE.search(gold + given):
        return plain_latex(given) in (plain_latex(gold), plain_latex(_BASE.sub("", gold)))
    first, second = (_items(text) for text in (gold, given))
    if (len(set(first)) < len(first) or len(set(second)) < len(second)) and sorted(first) != sorted(second):
        return False
    opened = [plain_latex(text)[:2] for text in (gold, given)]
    if any(a == "\\{" and b[:1] in ("(", "[") for a, b in (opened, opened[::-1])):
        return False
    return _equal(_parsed(gold), _parsed(given))


def _items(text: str) -> list[str]:
    """The items of a list; the whole text if it has no commas."""
    return re.sub(r"^(?:\\\{|[(\[])|(?:\\\}|[)\]])$", "", plain_latex(text)).split(",")


def _close(a: Any, b: Any, tolerance: float) -> Any:
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


@lru_cache(maxsize=10_000)
def _parsed(text: str) -> Any | None:
    """Parse a text as an expression; None if it is none, or would take too long to evaluate."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy

    written = text if _INDEX.search(text) else _IMAGINARY.sub("I", text)
    depth = accumulate((sign in "([{") - (sign in ")]}") for sign in written)
    if _APART.search(written) or _DIGITS.search(written) or max(depth, default=0) > _DEPTH:
        return None
    if re.search(r"binom|choose|gcd|lcm|det|amma|operatorname", written) and re.search(r"\d{5}|!|\^", written):
        return None  # the library works these out while it reads
    try:
        found = latex2sympy(
            written,
            is_real=None if "I" in written else True,
            normalization_config=NormalizationConfig(malformed_operators=True, nits=True, boxed="none"),
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except MemoryError:
        raise
    except Exception:  # its parser raises bare ones
        return None
    return None if too_large(found) else found


def _equal(gold: Any, given: Any) -> bool:
    from math_verify import verify
    from sympy import And, Eq, Float, Set

    relations = [isinstance(side, Eq | And) for side in (gold, given)]
    if relations[0] != relations[1]:
        relation, other = (gold, given) if relations[0] else (given, gold)
        if not _defines(relation) and not isinstance(other, Set):
            return False  # 2x = 7 and 8 = 7 are not 7
    if not verify([gold], [given], allow_set_relation_comp=True, timeout_seconds=None):
        return False
    if all(relations) and any(isinstance(side, Eq) and _empty(side) for side in (gold, given)):
        return False  # says nothing, and equals whatever else says nothing
    values = [_value(side.rhs if isinstance(side, Eq) else side) for side in (gold, given)]
    if any(value is not None and not value.is_finite for value in values):
        return gold == given and not getattr(given, "args", ())
    first, second = values
    if first is None or second is None:
        return True
    return bool(_close(first, second, RELATIVE if any(side.has(Float) for side in (gold, given)) else 1e-12))


def _defines(relation: Any) -> bool:
    """Whether an equation defines a symbol, as x = 7 and f(x) = 7 do, or is true arithmetic, as 3 + 4 = 7."""
    from sympy import Eq, Symbol
    from sympy.core.function import AppliedUndef

    if not isinstance(relation, Eq):
        return False
    if isinstance(relation.lhs, Symbol | AppliedUndef):
        return True
    return not relation.free_symbols and _empty(relation)


def _empty(equation: Any) -> bool:
    """Whether an equation holds for all values of its symbols."""
    from sympy import Expr, simplify

    if not all(isinstance(side, Expr) for side in equation.args):
        return False
    return bool(simplify(equation.lhs - equation.rhs) == 0)


def _value(expression: Any) -> Any | None:
    """The value to 30 digits if it is a number, finite or not."""
    from sympy import Expr

    if not isinstance(expression, Expr) or not expression.is_number:
        return None
    value = expression.doit().evalf(30)
    return value if value.is_number else None


def too_large(expression: Any) -> bool:
    """Whether evaluating it could take too long."""
    return _digits(expression, 1.0, 0) > MAX_DIGITS


def _digits(node: Any, of_symbol: float, depth: int) -> float:
    """A bound on the digits of a value, given the digits of symbols."""
    from sympy import Add, Function, MatrixBase, Pow, Product, Rational, Sum, Symbol, exp, factorial

    if isinstance(node, Rational | Symbol):
        return of_symbol if isinstance(node, Symbol) else math.log10(max(abs(node.p), node.q))
    parts = list(node) if isinstance(node, MatrixBase) else list(getattr(node, "args", ()))
    depth += isinstance(node, Function)
    limits = max((_digits(part, 0.0, depth) for part in parts[1:]), default=0.0)
    worked_out = isinstance(node, Sum | Product)
    sizes = [_digits(part, max(of_symbol, limits) if worked_out else of_symbol, depth) for part in parts] or [1.0]
    if depth > MAX_NESTED or max(sizes) == math.inf:
        return math.inf
    if not isinstance(node, Sum | Product | Pow | factorial | exp):
        return sum(sizes)
    times = limits if worked_out else sizes[-1]  # digits of how many times something is multiplied or added
    if times > math.log10(MAX_DIGITS) + 1:
        return math.inf
    if isinstance(node, Pow) and isinstance(node.base, Add) and node.base.free_symbols:
        return float(100 * 10 ** (times * (len(node.base.args) - 1)))  # for the terms of its expansion
    return float(10**times * (times + 0.5 if isinstance(node, factorial | exp) else max(sizes[0], 0.3)))
