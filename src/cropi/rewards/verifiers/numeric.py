"""The verifier `numeric`, and how numbers are read in a text. All of it takes time linear in the text."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from cropi.rewards.verifier import CORRECT, UNPARSEABLE_ANSWER, UNPARSEABLE_GOLD, WRONG, Answered, VerifierTable, Verify

USUAL_TOLERANCE = 1e-6

# A number as people write it: digits with thousands separators or a leading point, decimals, a fraction, a power of
# ten. The bounds on its length keep a completion of a million digits from becoming a million-digit integer.
_AMOUNT = r"(?:(?:\d{1,3}(?:,\d{3}){1,12}|\d{1,40})(?:\.\d{1,40})?|\.\d{1,40})(?:/\d{1,40}|[eE][-+]?\d{1,2})?"
NUMBER = re.compile(rf"[-+]?{_AMOUNT}")
_CURRENCY = r"\\?[$€£¥₹]"
_UNIT = (  # letters that may touch a number; others multiply it
    r"°[CF]?|\\?%|[mgshlLKCF]|[kcm][mg]|m[lL]|ft|in|lbs?|oz|am|pm|st|nd|rd|th|[hy]rs?|"
    r"-[A-Za-z]{2,30}|/(?:[A-Za-z]{2,30}|[hs])|(?!sin|cos|tan|log|exp|sqrt|mod)[A-Za-z]{3,30}"
)
_ALONE = re.compile(  # a stretch without spaces that holds a number and nothing to compute with it
    rf"[(\[{{'\"“‘*_`|<>~≈#\\$:]*((?:[-+]?{_CURRENCY}|{_CURRENCY}[-+]|[-+])?)({_AMOUNT})"
    rf"(?:{_CURRENCY}|(?:{_UNIT})[-/A-Za-z]{{0,30}}(?:\^?[23²³])?)?[)\]}}'\"”’*_`|<>\\$.,;:!?…]*"
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


class NumericVerifier(VerifierTable):
    """Right when the last number of the completion equals the recorded answer."""

    type: Literal["numeric"]
    tolerance: Annotated[float, Field(ge=0)] = USUAL_TOLERANCE
    """Largest difference that still counts as equal, relative to max(1, |gold|). Up to the default, whole numbers must
    be equal exactly."""

    def load(self) -> Verify:
        return self._judge

    def _judge(self, row: Answered) -> str:
        return compare_numbers(_last(row.completion), _last(row.answer.rpartition("####")[2]), self.tolerance)


def _last(text: str) -> Fraction | None:
    return next((value for value in reversed(numbers(text)) if value is not None), None)


def numbers(text: str) -> list[Fraction | None]:
    """Words with a digit, in order: the value of a number that stands alone, None for a part of an expression."""
    text = _SPACE.sub(" ", plain_signs(text).replace("{,}", ",").replace("^\\circ", "°").replace("^{\\circ}", "°"))
    text = re.sub(r"}\s+{", "}{", re.sub(r"\n[ \t]*[-+*•]\s", "\n", text))  # dashes of a list are no signs
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
    """Whether this neighbour makes a number part of an expression."""
    return bool(_OPERATOR.fullmatch(part) or re.match(r"\\[A-Za-z]|[^;=]*\u00a4|[-+.]?\d[^,;:]*$", part))


def plain_signs(text: str) -> str:
    """Replace dashes that may be minus signs, and full-width characters; remove characters without width."""
    return _EM_DASH.sub("-", text.translate(_PLAIN))


def compare_numbers(given: Fraction | None, expected: Fraction | None, tolerance: float) -> str:
    """Compare two numbers; None stands for one that cannot be read."""
    if expected is None:
        return UNPARSEABLE_GOLD
    if given is None:
        return UNPARSEABLE_ANSWER
    if tolerance <= USUAL_TOLERANCE and given.denominator == expected.denominator == 1:
        return CORRECT if given == expected else WRONG  # the tolerance is for rounding, not for counts
    margin = Fraction(tolerance) * max(Fraction(1), abs(expected))
    return CORRECT if abs(given - expected) <= margin else WRONG


def value_of(text: str) -> Fraction | None:
    """The value of a text that is a number; None for any other, which includes a division by zero."""
    if not NUMBER.fullmatch(text):
        return None
    try:
        return Fraction(text.replace(",", "").lstrip("+"))
    except ZeroDivisionError:
        return None
