"""The base classes of verifiers, and their processes. A verifier says whether a completion's answer is right."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator

from cropi.rewards.verdicts import UNPARSEABLE_GOLD, Answered, Graded, judged
from cropi.setting_types import Positive, PositiveNumber, Table

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
        """Turn a score into a verdict; None, as in TRL, excludes the row."""
        return UNPARSEABLE_GOLD if score is None else judged(float(score), self.threshold, graded=self.graded)


def _with_answer(template: str) -> str:
    if "{answer}" not in template:
        raise ValueError("must hold {answer}, where the recorded answer stands")
    return template


Template = Annotated[str, AfterValidator(_with_answer)]
