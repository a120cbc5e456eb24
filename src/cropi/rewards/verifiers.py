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

# A number as people write it: digits with thousands separators or a leading point, decimals, a fraction, a power of
# ten. The bounds on its length keep a completion of a million digits from becoming a million-digit integer.
_AMOUNT = r"(?:(?:\d{1,3}(?:,\d{3}){1,12}|\d{1,40})(?:\.\d{1,40})?|\.\d{1,40})(?:/\d{1,40}|[eE][-+]?\d{1,2})?"
NUMBER = re.compile(rf"[-+]?{_AMOUNT}")
_CURRENCY = r"\\?[$€£¥₹]"
_UNIT = (  # letters that may touch a number; others multiply it
    r"°[CF]?|\\?%|[mgshlLKCF]|[kcm][mg]|m[lL]|ft|in|lbs?|oz|am|pm|st|nd|rd|th|[hy]rs?|"
    r"-[A-Za-z]{2,}|/(?:[A-Za-z]{2,}|[hs])|(?!sin|cos|tan|log|exp|sqrt|mod)[A-Za-z]{3,}"
)
_ALONE = re.compile(  # a stretch without spaces that holds a number and nothing to compute with it
    rf"[(\[{{'\"“‘*_`|<>~≈#\\$:]*((?:[-+]?{_CURRENCY}|{_CURRENCY}[-+]|[-+])?)({_AMOUNT})"
    rf"(?:{_CURRENCY}|(?:{_UNIT})[-/A-Za-z]*(?:\^?[23²³])?)?[)\]}}'\"”’*_`|<>\\$.,;:!?…]*"
)
_INNERMOST = re.compile(  # a group in braces that shows what it holds; or arguments of a command, powers, indices
    r"(?:\\(?:boxed|fbox|mbox|text[a-z]*|math(?:rm|bf|it|sf))\s*|(?<![\w\\^}\]])){([^{}]*)}"
    r"|(?:\\[A-Za-z]+|[\^_])(?:\s*(?:\[[^][]*\]|{[^{}]*}))+"
)
_BREAK = re.compile(
    r"\\(?:begin|end)\s*{\w+\*?}|\\(?:implies|iff|to|therefore|(?:[Ll]ong)?[Rr]ightarrow|left|right)(?![A-Za-z])"
    r"|\\\\|[&;→⇒—]|(?<![\d\s]):|</?\w+>|[\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3]"
)
_SPACE = re.compile(r"\\[,:! ]|\\q?quad(?![A-Za-z])|~")
_OPERAND = re.compile(r".*[\d\u00a4].*[^,;:.!?]|\\[A-Za-z]+|[B-HJ-Zb-z]")  # it may stand before a minus
_OPERATOR = re.compile(r"[-+*/^:_×÷±·⋅∙√!]+|x")
_PLAIN = dict.fromkeys((0x2010, 0x2011, 0x2012, 0x2013, 0x2212, 0xFE63), "-")  # hyphens, en dash, minus
_PLAIN |= {0xFF01 + n: chr(0x21 + n) for n in range(94)} | dict.fromkeys((0x200B, 0x2060, 0xFEFF), "")
_EM_DASH = re.compile(r"(?<![^\s($])—(?=[$€£¥₹\\]*[\d.])")  # a sign only where nothing stands before it


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
    def last(text: str) -> Fraction | None:
        return next((value for value in reversed(numbers(text)) if value is not None), None)

    return _compare(last(completion), last(gold.rpartition("####")[2]), tolerance)


def _gsm8k(completion: str, gold: str) -> str:
    _, marked, answer = completion.rpartition("####")
    first, expected = ((numbers(text) or [None])[0] for text in (answer, gold.rpartition("####")[2]))
    return _compare(first if marked else None, expected, 0.0)


def numbers(text: str) -> list[Fraction | None]:
    """What holds a digit, in order: the value of a number that stands alone, None for a part of an expression."""
    text = _SPACE.sub(" ", plain_signs(text).replace("{,}", ",").replace("^\\circ", "°").replace("^{\\circ}", "°"))
    text = re.sub(r"}\s+{", "}{", re.sub(r"\n\s*[-+*•]\s", "\n", text))  # dashes of a list are no signs
    for _ in range(5):  # from the inside out
        text = _INNERMOST.sub(lambda group: "\u00a4" if group[1] is None else f" {group[1]} ", text)
    text = re.sub(r"=|≈|\\approx(?![A-Za-z])", " = ", _BREAK.sub(" ; ", text))
    return [value for line in text.split("\n") for value in _of_line(line.split())]


def _of_line(parts: list[str]) -> list[Fraction | None]:
    found = list[Fraction | None]()
    for at, part in enumerate(parts):
        if not re.search(r"\d", part):
            continue
        alone = _ALONE.fullmatch(part)
        sign, before = "", parts[max(at - 2, 0) : at]
        if alone and before and before[-1] in ("-", "+") and not (before[1:] and _OPERAND.fullmatch(before[0])):
            sign = before.pop()
        left, right = "".join(before[-1:]), "".join(parts[at + 1 : at + 2])
        if alone is None or _joins(left) or _joins(right) or right == "=" or (sign and re.search("[-+]", alone[1])):
            found.append(None)
        else:
            found.append(value_of(re.sub(r"[^-+]", "", sign + alone[1]) + alone[2]))
    return found


def _joins(part: str) -> bool:
    """Whether what stands beside a number makes it a part of something."""
    return bool(_OPERATOR.fullmatch(part) or re.match(r"\\[A-Za-z]|[^;=]*\u00a4|[-+.]?\d[^,;:]*$", part))


def plain_signs(text: str) -> str:
    """One minus sign for all dashes that may be one, ASCII for full-width characters, and nothing of no width."""
    return _EM_DASH.sub("-", text.translate(_PLAIN))


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
_SPACING = re.compile(r"(?<!\\)\\[,;:! ]|\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\s+|[$~]")
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


def value_of(text: str) -> Fraction | None:
    """The value of what `NUMBER` has found; None where it is not finite."""
    try:
        value = Fraction(text.replace(",", "").lstrip("+"))
    except (ValueError, ZeroDivisionError):
        return None
    return value if math.isfinite(float(value)) else None
