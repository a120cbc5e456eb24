"""Verifiers and their verdicts. A verifier compares a completion with the recorded (gold) answer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

from cropi.config import ExactVerifier, Gsm8kVerifier, NumericVerifier

CORRECT = "correct"
WRONG = "wrong"
UNPARSEABLE_ANSWER = "unparseable_answer"  # the completion holds no answer in the form asked for: reward 0
UNPARSEABLE_GOLD = "unparseable_gold"  # the recorded answer is not in that form: the row is excluded, never scored 0

Verify = Callable[[str, str], str]  # (completion, gold) -> verdict

# A number as people write it: sign, digits with thousands separators or a leading point, decimals, a fraction, a power
# of ten. It must not go on at either side: a part of a longer number is another number. The bounds on its length keep a
# completion of a million digits from becoming a million-digit integer.
_NUMBER = re.compile(
    r"(?<![\d./])(?<!\d,)[-+]?"
    r"(?:(?:\d{1,3}(?:,\d{3}){1,12}|\d{1,40})(?:\.\d{1,40})?|\.\d{1,40})"
    r"(?:/\d{1,40}|[eE][-+]?\d{1,2})?(?![\d/]|[.,]\d)"
)
_MINUS = str.maketrans({"\u2212": "-"})  # the minus sign of typesetters


def verifier(config: ExactVerifier | NumericVerifier | Gsm8kVerifier) -> Verify:
    """The function (completion, gold) -> verdict that a config names."""
    match config:
        case ExactVerifier():
            return lambda completion, gold: _exact(completion, gold, config.marker)
        case NumericVerifier():
            return lambda completion, gold: _numeric(completion, gold, config.tolerance)
        case Gsm8kVerifier():
            return _gsm8k


def reward(verdict: str) -> float | None:
    """1 for correct, None (no reward at all) for a gold answer that cannot be read, 0 for anything else."""
    return None if verdict == UNPARSEABLE_GOLD else float(verdict == CORRECT)


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
    given = first_number(answer) if marked else None
    return _compare(given, first_number(gold.rpartition("####")[2]), 1e-6)


def _compare(given: Fraction | None, expected: Fraction | None, tolerance: float) -> str:
    if expected is None:
        return UNPARSEABLE_GOLD
    if given is None:
        return UNPARSEABLE_ANSWER
    margin = Fraction(tolerance) * max(Fraction(1), abs(expected))
    return CORRECT if abs(given - expected) <= margin else WRONG


def first_number(text: str) -> Fraction | None:
    """The first number of a text, exactly; None where there is none."""
    found = _NUMBER.search(text.translate(_MINUS))
    return _value(found.group()) if found else None


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly; None where there is none."""
    numbers = _NUMBER.findall(text.translate(_MINUS))
    return _value(numbers[-1]) if numbers else None


def _value(text: str) -> Fraction | None:
    try:
        value = Fraction(text.replace(",", "").lstrip("+"))
    except (ValueError, ZeroDivisionError):
        return None
    return value if math.isfinite(float(value)) else None
