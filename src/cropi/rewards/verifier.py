"""What a verifier is given, what it says of an answer, and the base classes of verifiers with their processes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from cropi.setting_types import Positive, PositiveNumber, Table

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


Verify = Callable[[Answered], str | Graded]


class VerificationConfig(Table):
    """The processes that verifiers run in."""

    processes: Annotated[int, Field(ge=1, le=1024)] = 2
    """Largest number of processes."""
    seconds: PositiveNumber = 5.0
    """Wall-clock time for one answer. A process that takes longer is ended; the answer is tried once more and then
    judged `timeout`."""
    memory_mb: Positive = 1024
    """MiB that judging may take beyond what a process has after start-up, if the system can limit it."""


class VerifierTable(Table, ABC):
    """The settings of a verifier. A subclass adds `type`, a Literal that names it in a config, and `load`."""

    pure: ClassVar[bool] = True  # equal rows always get equal verdicts, so they may be cached
    type: str

    @property
    def gives_grades(self) -> bool:
        """Whether rewards may lie between 0 and 1."""
        return False

    @abstractmethod
    def load(self) -> Verify:
        """Return the function row -> verdict. ImportError or ValueError if it cannot be set up."""

    def completion_with(self, answer: str) -> str:
        """Write a completion that gives this answer in the verifier's format."""
        return answer


class ScoringVerifier(VerifierTable):
    """A verifier that gives a score."""

    graded: bool = False
    """Use the score, from 0 to 1, as the reward. `threshold` then decides only which answers accuracies count."""
    threshold: float
    """Score from which an answer is right."""

    @property
    def gives_grades(self) -> bool:
        return self.graded

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.graded and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1 where graded, not {self.threshold:g}")
        return self

    def verdict(self, score: float | None) -> str | Graded:
        """Turn a score into a verdict; None, as in TRL, excludes the row. If graded, the score is the reward too.

        ValueError for NaN; GradeError for a graded score outside 0 to 1 by more than rounding.
        """
        if score is None:
            return UNPARSEABLE_GOLD
        score = float(score)
        if math.isnan(score):
            raise ValueError("the score is not a number")
        if not self.graded:
            return CORRECT if score >= self.threshold else WRONG
        if not -ROUNDING <= score <= 1 + ROUNDING:
            raise GradeError(f"the score {score!r} is outside 0 to 1, where graded rewards must lie")
        grade = min(max(score, 0.0), 1.0)
        return Graded(CORRECT if grade >= self.threshold else WRONG, grade)


def _with_answer(template: str) -> str:
    if "{answer}" not in template:
        raise ValueError("must hold {answer}, where the recorded answer stands")
    return template


Template = Annotated[str, AfterValidator(_with_answer)]
