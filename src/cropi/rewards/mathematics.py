r"""The verifier `math`: answers in LaTeX or plain writing, compared by meaning with math-verify.

What is handed to the library is one short expression, never a whole completion, and what it calls equal is checked
again where it is known to be too kind. In its issue tracker (github.com/huggingface/Math-Verify): numbers near zero are
rounded to the same (#14), a part of an answer may pass for all of it (#47), equations that say nothing equal each other
(#60), a gold answer outside a LaTeX environment reads as nothing or as something else (#70), Markdown's asterisks were
read as a product (#76), and 2 2/3 is one (#81).
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from cropi.config import MathVerifier
from cropi.rewards.verdicts import CORRECT, UNPARSEABLE_ANSWER, UNPARSEABLE_GOLD, WRONG, Answered
from cropi.rewards.verifiers import NUMBER, Verify, last_boxed, plain_latex, value_of

RELATIVE = 2e-6  # numbers of which one is a decimal are equal up to this share of the larger
_ANNOUNCED = re.compile(r"####|\banswer\s+is\b|\banswer\s*:", re.IGNORECASE)
_MARKS = re.compile(r"^[\s*_`$:]+|(?:[\s*_`$]|\.(?!\d))+$")  # Markdown, dollar signs, a full stop
_WORDS = re.compile(r"(?:\\(?:text|mathrm|textbf|mbox)\s*\{\s*)?([A-Za-z][A-Za-z' -]+?)\s*\}?")
_MIXED = re.compile(r"([-+]?)(\d{1,20})(?:\s*\\frac\s*\{(\d{1,20})\}\s*\{(\d{1,20})\}|\s+(\d{1,20})\s*/\s*(\d{1,20}))")
_APART = re.compile(r"\d\s+\d")  # two numbers side by side are neither a product nor a sum
_THOUSANDS = re.compile(r"\d{1,3}(?:(?:\\[,; ]|\s|\{,\})\d{3})+(?!\d)")
_DEPTH = 10  # of brackets: the library's time grows exponentially with it
_DIGITS = re.compile(r"\d{40}")


def math_verifier(config: MathVerifier) -> Verify:
    """Row -> verdict. ImportError where math-verify is missing."""
    try:
        import math_verify  # noqa: F401
    except ImportError:
        raise ImportError("the verifier `math` needs math-verify: pip install 'cropi[math]'") from None
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that it has no time limit: we have one

    def verify(row: Answered) -> str:
        gold = answer_text(row.answer, boxed_only=False)
        gold = gold if gold is not None else _bare(row.answer)
        if not gold or len(gold) > config.max_length:
            return UNPARSEABLE_GOLD
        given = answer_text(row.completion, boxed_only=config.boxed_only)
        if not given or len(given) > config.max_length:
            return UNPARSEABLE_ANSWER
        return compare(gold, given)

    return verify


def answer_text(text: str, *, boxed_only: bool) -> str | None:
    r"""The last `\boxed{...}` that closes, else the line after the last `####`, `answer is` or `answer:`; else None."""
    boxed = last_boxed(text)
    if boxed is not None:
        return _bare(boxed)
    announced = None
    if not boxed_only:
        for announced in _ANNOUNCED.finditer(text):  # noqa: B007 - the last one is wanted
            pass
    if announced is None:
        return None
    lines = text[announced.end() :].strip().splitlines()
    return _bare(lines[0]) if lines else ""


def _bare(text: str) -> str:
    return _MARKS.sub("", text.strip())


def compare(gold: str, given: str) -> str:
    """The verdict on two answers, each one expression."""
    if plain_latex(gold) == plain_latex(given):
        return CORRECT
    words, other = (_WORDS.fullmatch(text) for text in (gold, given))
    if words is not None:  # the letters of a word are no product of symbols
        return CORRECT if other is not None and words[1].casefold() == other[1].casefold() else WRONG
    expected, number = (_number(text) for text in (gold, given))
    if expected is not None and number is not None:
        exact = _exact(gold) and _exact(given)
        return CORRECT if expected == number or (not exact and _close(expected, number)) else WRONG
    expression = _parsed(gold)
    if expression is None:
        return UNPARSEABLE_GOLD
    candidate = _parsed(given)
    if candidate is None:
        return UNPARSEABLE_ANSWER
    return CORRECT if _equal(expression, candidate, percent="%" in gold + given) else WRONG


def _number(text: str) -> Fraction | None:
    """A text that is one number and nothing else."""
    text = _THOUSANDS.sub(lambda found: re.sub(r"\D", "", found.group()), text.replace("\u2212", "-").strip())
    mixed = _MIXED.fullmatch(text)
    if mixed is not None:
        whole, top, bottom = int(mixed[2]), int(mixed[3] or mixed[5]), int(mixed[4] or mixed[6])
        if not bottom:
            return None
        value = whole + Fraction(top, bottom)
        return -value if mixed[1] == "-" else value
    return value_of(text) if NUMBER.fullmatch(text) else None


def _exact(text: str) -> bool:
    return not re.search(r"[.eE]", text)


def _close(a: Any, b: Any) -> bool:
    return bool(abs(a - b) <= RELATIVE * max(abs(a), abs(b)))


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Any | None:
    """The expression that a text means; None where it means none, or holds a number that nobody would compute with."""
    from math_verify import LatexExtractionConfig, parse

    mixed = _MIXED.sub(_sum, text)
    thousands = _THOUSANDS.sub(lambda found: re.sub(r"\D", "", found.group()), mixed)
    if _APART.search(thousands) or _DIGITS.search(thousands) or _too_deep(thousands):
        return None
    latex = LatexExtractionConfig(boxed_match_priority=0)
    wrapped = f"\\boxed{{{thousands}}}"
    found = parse(wrapped, extraction_config=[latex], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None


def _too_deep(text: str) -> bool:
    depth = 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if depth > _DEPTH:
            return True
    return False


def _sum(mixed: re.Match[str]) -> str:
    whole, top, bottom = int(mixed[2]), int(mixed[3] or mixed[5]), int(mixed[4] or mixed[6])
    return f"{mixed[1]}\\frac{{{whole * bottom + top}}}{{{bottom}}}"


def _equal(gold: Any, given: Any, *, percent: bool) -> bool:
    from math_verify import verify
    from sympy import Eq, Float

    if not verify([gold], [given], allow_set_relation_comp=True, timeout_seconds=None):
        return False
    for side in (gold, given):
        if isinstance(side, Eq) and _empty(side):
            return False  # says nothing, and equals whatever else says nothing
    values = [_complex(side.rhs if isinstance(side, Eq) else side) for side in (gold, given)]
    first, second = values
    if first is None or second is None:
        return True
    decimal = any(side.has(Float) for side in (gold, given))
    tolerance = RELATIVE if decimal else 1e-12
    scales = (1, 100, 0.01) if percent else (1,)
    return any(abs(first * s - second) <= tolerance * max(abs(first * s), abs(second)) for s in scales)


def _empty(equation: Any) -> bool:
    """Whether an equation holds whatever its symbols are."""
    from sympy import Expr, simplify

    if not all(isinstance(side, Expr) for side in equation.args):
        return False
    return bool(simplify(equation.lhs - equation.rhs) == 0)


def _complex(expression: Any) -> Any | None:
    """Its value to 30 digits where it is a finite number."""
    from sympy import Expr

    if not isinstance(expression, Expr) or not expression.is_number or expression.is_finite is False:
        return None
    value = expression.doit().evalf(30)
    return value if value.is_number and value.is_finite is not False else None
