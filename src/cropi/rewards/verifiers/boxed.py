r"""The verifier `boxed`: the last `\boxed{...}` holds the same LaTeX as the recorded answer."""

from __future__ import annotations

import re
from typing import Literal

from cropi.rewards.verifier import CORRECT, UNPARSEABLE_ANSWER, UNPARSEABLE_GOLD, WRONG, Answered, VerifierTable, Verify

_BRACES = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\.|([{}])", re.DOTALL)
_APART = re.compile(r"(?<=\d)(?:\\[,;:! ]|\\q?quad(?![A-Za-z])|\s|~)+(?=\d)")  # between digits it separates
_SPACING = re.compile(r"(?<!\\)\\[,;:! ]|\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\s+|[$~]")
_SHORT = re.compile(r"([_^])\{(\w)\}")
_FRACTION = re.compile(r"\\[dt]frac(?![A-Za-z])")


class BoxedVerifier(VerifierTable):
    r"""Right when the last `\boxed{...}` holds the same LaTeX as the recorded answer, spacing aside."""

    type: Literal["boxed"]

    def load(self) -> Verify:
        return _judge

    def completion_with(self, answer: str) -> str:
        return in_box(answer)


def _judge(row: Answered) -> str:
    inner = last_boxed(row.answer)
    expected = plain_latex(row.answer if inner is None else inner)
    if not expected:
        return UNPARSEABLE_GOLD
    given = last_boxed(row.completion)
    if given is None or not plain_latex(given):
        return UNPARSEABLE_ANSWER
    return CORRECT if plain_latex(given) == expected else WRONG


def in_box(answer: str) -> str:
    r"""The answer in a `\boxed{...}`, unless it has one."""
    return answer if last_boxed(answer) is not None else f"\\boxed{{{answer}}}"


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces close; None if there is none.

    Of nested boxes the outermost counts. Escaped braces do not count.
    """
    found, open_at = None, list[int]()  # the span of the last box; starts of boxes still open, -1 for other braces
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
    """LaTeX without spacing, dollar signs and a final full stop, with one name for fractions of all sizes.

    Digits that stand apart stay apart.
    """
    parts = _APART.split(_FRACTION.sub(r"\\frac", text))
    text = _SHORT.sub(r"\1\2", " ".join(_SPACING.sub("", part) for part in parts))
    return text if text.endswith("..") else text.removesuffix(".")
