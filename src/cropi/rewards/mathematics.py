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
_MARKS = " \t\n\r*_`$"  # Markdown and dollar signs
_TEXT = r"\\(?:text|textbf|textrm|mathrm|mbox)\s*\{\s*([^{}]*?)\s*\}"
_WORDS = re.compile(rf"(?:{_TEXT}|([A-Za-z]{{3,}}(?:[ '-][A-Za-z]+)*))\.?")
_MIXED = re.compile(
    r"(?<![\w^\\}.])([-+]?)(\d{1,20})"
    r"(?:\s*\\frac\s*\{(\d{1,20})\}\s*\{(\d{1,20})\}|\s+(\d{1,20})\s*/\s*(\d{1,20}))(?![\d.])"
)
_SPACES = re.compile(r"(?:\\[,;:! ]|\\q?quad(?![A-Za-z])|~|\s)+")
_APART = re.compile(r"\d\s+\d")  # two numbers side by side are neither a product nor a sum
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\\[,; ]|\s|\{,\})\d{3})+(?!\d)")
_DEPTH = 10  # of brackets: the library's time grows exponentially with it
_DIGITS = re.compile(r"\d{40}")
_UNIT = re.compile(r"(?<=[\d\s}])([A-Za-z]{2,}(?:\s+[A-Za-z.]+)*)\s*$")
_COMMANDS = re.compile(rf"{_TEXT}|\\[A-Za-z]+")
_BASE = re.compile(r"\d_\{?\d")
_DOTS = re.compile(r"\.\.\.|\\[lc]?dots|\u2026")


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
    text = text.strip().lstrip(_MARKS + ":").rstrip(_MARKS)
    return text if text.endswith("..") else text.removesuffix(".").rstrip(_MARKS)


def compare(gold: str, given: str) -> str:
    """The verdict on two answers, each one expression. Whether the gold answer can be read depends on it alone."""
    if not _readable(gold):
        return UNPARSEABLE_GOLD
    if plain_latex(gold) == plain_latex(given):
        return CORRECT
    words, others = _words(gold), _words(given)
    if words is not None:  # the letters of a word are no product of symbols
        return CORRECT if words == others else WRONG
    expected, number = _number(gold), _number(given)
    if expected is not None and number is not None:
        exact = _exact(gold) and _exact(given)
        return CORRECT if expected == number or (not exact and _close(expected, number)) else WRONG
    if _differ(gold, given):
        return WRONG
    candidate = _parsed(given)
    if candidate is None:
        return UNPARSEABLE_ANSWER
    return CORRECT if _equal(_parsed(gold), candidate, percent="%" in gold + given) else WRONG


def _readable(gold: str) -> bool:
    return _words(gold) is not None or _number(gold) is not None or _parsed(gold) is not None


def _words(text: str) -> str | None:
    found = _WORDS.fullmatch(text.strip())
    if found is None:
        return None
    words = found[1] if found[1] is not None else found[2]
    return " ".join(words.casefold().split()) if re.fullmatch(r"[^\W\d_][^\d\\^_{}$]*", words) else None


def _differ(gold: str, given: str) -> bool:
    """Whether two answers differ in what the library drops: units, text, bases, case, repetition, brackets, dots."""
    if _DOTS.search(gold + given):
        return True
    if _BASE.search(gold + given):
        return plain_latex(re.sub(r"_\{?\d+\}?", "", gold)) != plain_latex(given)
    if any(re.search(rf"{_TEXT}.*\d", text, re.DOTALL) for text in (gold, given)):  # 2 hours 30 minutes
        return True
    units = [_units(text) for text in (gold, given)]
    if all(units) and units[0] != units[1]:
        return True
    letters = [_COMMANDS.sub("", text) for text in (gold, given)]
    raw = [sorted(re.findall("[A-Za-z]", text)) for text in letters]
    if raw[0] != raw[1] and sorted(map(str.lower, raw[0])) == sorted(map(str.lower, raw[1])):
        return True
    if any(letter.swapcase() in raw[0] for letter in raw[0]):  # R and r are the same to the library
        return True
    first, second = (_items(text) for text in (gold, given))
    repeats = len(set(first)) < len(first) or len(set(second)) < len(second)
    if repeats and sorted(first) != sorted(second):
        return True
    opened = [plain_latex(text)[:2] for text in (gold, given)]
    return any(a == "\\{" and b[:1] in ("(", "[") for a, b in (opened, opened[::-1]))


def _units(text: str) -> list[str]:
    plain = _UNIT.search(text)
    found = re.findall(_TEXT, text) or ([plain[1]] if plain else [])
    return [re.sub(r"[.\s]", "", unit).casefold().rstrip("s") for unit in found if unit]


def _items(text: str) -> list[str]:
    """What stands between the commas of a list; one where there are none."""
    inner = re.sub(r"^(?:\\\{|[(\[])|(?:\\\}|[)\]])$", "", plain_latex(text))
    return inner.split(",") if "," in inner else [inner]


def _number(text: str) -> Fraction | None:
    """A text that is one number and nothing else."""
    text = _spaced(text.replace("\u2212", "-")).strip()
    mixed = _MIXED.fullmatch(text)
    if mixed is not None:
        value = _mixed_value(mixed)
        return value if value is None or mixed[1] != "-" else -value
    return value_of(text) if NUMBER.fullmatch(text) else None


def _spaced(text: str) -> str:
    """Thousands joined, other spacing as spaces."""
    return _SPACES.sub(" ", _THOUSANDS.sub(lambda found: re.sub(r"\D", "", found.group()), text))


def _mixed_value(mixed: re.Match[str]) -> Fraction | None:
    whole, top, bottom = int(mixed[2]), int(mixed[3] or mixed[5]), int(mixed[4] or mixed[6])
    return whole + Fraction(top, bottom) if bottom else None


def _exact(text: str) -> bool:
    return not re.search(r"[.eE]", text)


def _close(a: Any, b: Any) -> bool:
    return bool(abs(a - b) <= RELATIVE * max(abs(a), abs(b)))


@lru_cache(maxsize=10_000)
def _parsed(text: str) -> Any | None:
    """The expression that a text means; None where it means none, or holds a number that nobody would compute with."""
    from math_verify import LatexExtractionConfig, parse

    written = _MIXED.sub(_sum, _spaced(text))
    if _APART.search(written) or _DIGITS.search(written) or _too_deep(written) or not written.strip():
        return None
    latex = LatexExtractionConfig(boxed_match_priority=0)
    wrapped = f"\\boxed{{{written}}}"
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
    value = _mixed_value(mixed)
    return mixed[0] if value is None else f"{mixed[1]}\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _equal(gold: Any, given: Any, *, percent: bool) -> bool:
    from math_verify import verify
    from sympy import And, Eq, Float

    relations = [isinstance(side, Eq | And) for side in (gold, given)]
    if relations[0] != relations[1]:
        relation = gold if relations[0] else given
        if not _defines(relation) and not _is_set(given if relations[0] else gold):
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
    decimal = any(side.has(Float) for side in (gold, given))
    tolerance = RELATIVE if decimal else 1e-12
    scales = (1, 100, 0.01) if percent else (1,)
    return any(abs(first * s - second) <= tolerance * max(abs(first * s), abs(second)) for s in scales)


def _defines(relation: Any) -> bool:
    """Whether an equation names something, as x = 7 and f(x) = 7 do, or is true arithmetic, as 3 + 4 = 7."""
    from sympy import Eq, Symbol
    from sympy.core.function import AppliedUndef

    if not isinstance(relation, Eq):
        return False
    if isinstance(relation.lhs, Symbol | AppliedUndef):
        return True
    return not relation.free_symbols and _empty(relation)


def _is_set(expression: Any) -> bool:
    from sympy import Set

    return isinstance(expression, Set)


def _empty(equation: Any) -> bool:
    """Whether an equation holds whatever its symbols are."""
    from sympy import Expr, simplify

    if not all(isinstance(side, Expr) for side in equation.args):
        return False
    return bool(simplify(equation.lhs - equation.rhs) == 0)


def _value(expression: Any) -> Any | None:
    """Its value to 30 digits where it is a number, an infinite one too."""
    from sympy import Expr

    if not isinstance(expression, Expr) or not expression.is_number:
        return None
    value = expression.doit().evalf(30)
    return value if value.is_number else None
