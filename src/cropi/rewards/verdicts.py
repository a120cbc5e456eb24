"""Input and output of verifiers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

CORRECT = "correct"
WRONG = "wrong"
UNPARSEABLE_ANSWER = "unparseable_answer"  # the completion holds no answer in the form asked for: reward 0
UNPARSEABLE_GOLD = "unparseable_gold"  # the recorded answer is not in that form: the row is excluded, never scored 0
TIMEOUT = "timeout"  # twice: reward 0
ERROR = "error"  # the verifier raised, or its process died twice: reward 0
VERDICTS = (CORRECT, WRONG, UNPARSEABLE_ANSWER, UNPARSEABLE_GOLD, TIMEOUT, ERROR)

ROUNDING = 1e-6  # by which a sum of partial credits may miss 0 or 1


class GradeError(ValueError):
    """A grade outside 0 to 1."""


class Answered(NamedTuple):
    """A completion, the recorded (gold) answer, and further facts that some verifiers need."""

    completion: str
    answer: str
    source: str = ""
    prompt: str = ""  # JSON: text or chat messages
    extra: str = ""  # JSON: an object with the row's further columns


class Graded(NamedTuple):
    """A verdict with its own reward, from 0 to 1."""

    verdict: str
    grade: float


class Judgement(NamedTuple):
    """A verdict, the wall-clock seconds that it took, an error note if it failed, and its grade if it has one."""

    verdict: str
    seconds: float
    note: str = ""
    grade: float | None = None

    @property
    def reward(self) -> float | None:
        """The grade, else the reward of the verdict."""
        return reward(self.verdict) if self.grade is None else self.grade


Judge = Callable[[Sequence[Answered]], list[Judgement]]  # in the order of the rows


def answered(completion: str, prompt: Mapping[str, Any]) -> Answered:
    """A completion for a row of the prompt table."""
    return Answered(completion, prompt["answer"], prompt["source"], prompt["messages"], prompt.get("extra") or "")


def reward(verdict: str | Graded) -> float | None:
    """The grade, else 1 for correct, None (no reward) for an unreadable gold answer, and 0 for others."""
    if isinstance(verdict, Graded):
        return verdict.grade
    return None if verdict == UNPARSEABLE_GOLD else float(verdict == CORRECT)


def judged(score: float, threshold: float, *, graded: bool) -> str | Graded:
    """Turn a score into a verdict: right from the threshold on. If graded, the score is the reward too.

    ValueError for NaN; GradeError for a graded score outside 0 to 1 by more than rounding.
    """
    if math.isnan(score):
        raise ValueError("the score is not a number")
    if not graded:
        return CORRECT if score >= threshold else WRONG
    if not -ROUNDING <= score <= 1 + ROUNDING:
        raise GradeError(f"the score {score!r} is outside 0 to 1, where graded rewards must lie")
    grade = min(max(score, 0.0), 1.0)
    return Graded(CORRECT if grade >= threshold else WRONG, grade)
