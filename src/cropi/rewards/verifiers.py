"""Verifiers: is a completion's answer right?

A verifier compares a completion with the recorded (gold) answer and gives a verdict. Here are those of our own, which
are pure string work in time linear in the text; `mathematics` and `adapters` have those that call libraries. All run in
the processes of `pool`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

from cropi.config import (
    BoxedVerifier,
    ExactVerifier,
    FunctionVerifier,
    Gsm8kVerifier,
    MathVerifier,
    NumericVerifier,
    ReasoningGymVerifier,
    Verifier,
    VerlVerifier,
)
from cropi.rewards.verdicts import CORRECT, UNPARSEABLE_ANSWER, UNPARSEABLE_GOLD, WRONG, Answered, Graded

Verify = Callable[[Answered], str | Graded]

USUAL_TOLERANCE = 1e-6

# A number as people write it: sign, digits with thousands separators or a leading point, decimals, a fraction, a power
# of ten. It must not go on at either side, nor stand beside another number or a slash: a part of a longer number is
# another number. The bounds on its length keep a completion of a million digits from becoming a million-digit integer.
NUMBER = re.compile(
    r"(?<![\d./^_'])(?<!\{,\})(?<!\d,)(?<!\d[eE])(?<!\d[eE][-+])(?<!\d[ \t])(?<!/[ \t])(?<!/-)[-+]?"
    r"(?:(?:\d{1,3}(?:,\d{3}){1,12}|\d{1,40})(?:\.\d{1,40})?|\.\d{1,40})"
    r"(?:/\d{1,40}|[eE][-+]?\d{1,2})?"
    r"(?![\d/^_\u00bc-\u00be\u00b2\u00b3\u00b9\u2070-\u2079]|[.,]\d|[eE][-+]?\d|\{,\}|[ \t]*/|[ \t]+\d)"
)
_GOES_ON = re.compile(r"[ \t]*[-+*/^=:\u00d7\u00f7][ \t]*[-+]?\d")  # after a number: it was but the start of a sum
_MINUS = str.maketrans({"\u2212": "-"})  # the minus sign of typesetters


def verifier(config: Verifier) -> Verify:
    """The function row -> verdict that a config names. ImportError, ValueError where it cannot be had."""
    match config:
        case ExactVerifier():
            return lambda row: _exact(row.completion, row.answer, config.marker)
        case NumericVerifier():
            return lambda row: _numeric(row.completion, row.answer, config.tolerance)
        case Gsm8kVerifier():
            return lambda row: _gsm8k(row.completion, row.answer)
        case BoxedVerifier():
            return lambda row: _boxed(row.completion, row.answer)
        case MathVerifier():
            from cropi.rewards.mathematics import math_verifier

            return math_verifier(config)
        case ReasoningGymVerifier():
            from cropi.rewards.adapters import reasoning_gym_verifier

            return reasoning_gym_verifier(config)
        case FunctionVerifier():
            from cropi.rewards.adapters import function_verifier

            return function_verifier(config)
        case VerlVerifier():
            from cropi.rewards.adapters import verl_verifier

            return verl_verifier(config)


def written_gold(config: Verifier, answer: str) -> str:
    """The gold answer as a completion would give it."""
    marker = getattr(config, "marker", None)
    if marker is not None:
        return f"{marker} {answer}"
    written = getattr(config, "written", None)
    if written is not None:
        return str(written).replace("{answer}", answer)
    if config.type == "gsm8k":
        return answer if "####" in answer else f"#### {answer}"
    if config.type in ("boxed", "math"):
        return answer if last_boxed(answer) is not None else f"\\boxed{{{answer}}}"
    return answer


def _exact(completion: str, gold: str, marker: str | None) -> str:
    expected = gold.split()
    if not expected:
        return UNPARSEABLE_GOLD
    if marker is not None:
        _, found, completion = completion.rpartition(marker)
        if not found:
            return UNPARSEABLE_ANSWER
    given = completion.split()
    if not given:
        return UNPARSEABLE_ANSWER
    return CORRECT if given == expected else WRONG


def _numeric(completion: str, gold: str, tolerance: float) -> str:
    return _compare(last_number(completion), last_number(gold.rpartition("####")[2]), tolerance)


def _gsm8k(completion: str, gold: str) -> str:
    _, marked, answer = completion.rpartition("####")
    given = _only_number(answer) if marked else None
    return _compare(given, _only_number(gold.rpartition("####")[2]), 0.0)


def _only_number(text: str) -> Fraction | None:
    """The first number of a text, unless it is the start of a sum or an equation."""
    text = text.translate(_MINUS)
    found = NUMBER.search(text)
    return None if found is None or _GOES_ON.match(text, found.end()) else value_of(found.group())


def _boxed(completion: str, gold: str) -> str:
    expected = plain_latex(gold if (inner := last_boxed(gold)) is None else inner)
    if not expected:
        return UNPARSEABLE_GOLD
    given = last_boxed(completion)
    if given is None or not plain_latex(given):
        return UNPARSEABLE_ANSWER
    return CORRECT if plain_latex(given) == expected else WRONG


_BRACES = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\.|([{}])", re.DOTALL)
_APART = re.compile(r"(?<=\d)(?:\\[,;:! ]|\\q?quad(?![A-Za-z])|\s|~)+(?=\d)")  # between digits it separates
_SPACING = re.compile(r"\\[,;:! ]|\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\s+|[$~]")
_SHORT = re.compile(r"([_^])\{(\w)\}")
_FRACTION = re.compile(r"\\[dt]frac(?![A-Za-z])")


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` whose braces close; None where there is none.

    Of nested boxes the outermost. Escaped braces do not count.
    """
    found, open_at = None, list[int]()  # where the last one stands
    for match in _BRACES.finditer(text):
        box, brace = match.groups()
        if box:
            open_at.append(match.end())
        elif brace == "{":
            open_at.append(-1)
        elif brace and open_at and (start := open_at.pop()) >= 0:
            found = (start, match.start())
    return None if found is None else text[slice(*found)]


def plain_latex(text: str) -> str:
    """Without spacing, dollar signs and the full stop at the end; one name for fractions of all sizes.

    Digits that stand apart stay apart.
    """
    parts = _APART.split(_FRACTION.sub(r"\\frac", text))
    text = _SHORT.sub(r"\1\2", " ".join(_SPACING.sub("", part) for part in parts))
    return text if text.endswith("..") else text.removesuffix(".")


def _compare(given: Fraction | None, expected: Fraction | None, tolerance: float) -> str:
    if expected is None:
        return UNPARSEABLE_GOLD
    if given is None:
        return UNPARSEABLE_ANSWER
    if tolerance <= USUAL_TOLERANCE and given.denominator == expected.denominator == 1:
        return CORRECT if given == expected else WRONG  # a tolerance for rounding is none for counting
    margin = Fraction(tolerance) * max(Fraction(1), abs(expected))
    return CORRECT if abs(given - expected) <= margin else WRONG


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly; None where there is none."""
    numbers = NUMBER.findall(text.translate(_MINUS))
    return value_of(numbers[-1]) if numbers else None


def value_of(text: str) -> Fraction | None:
    """The value of what `NUMBER` has found; None where it is not finite."""
    try:
        value = Fraction(text.replace(",", "").lstrip("+"))
    except (ValueError, ZeroDivisionError):
        return None
    return value if math.isfinite(float(value)) else None
