"""How a completion is judged."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from cropi.setting_types import Positive, PositiveNumber, Table


class VerifierTable(Table):
    """One verifier."""

    pure: ClassVar[bool] = True  # equal rows always get equal verdicts

    @property
    def gives_grades(self) -> bool:
        """Whether rewards are other than 0 and 1."""
        return False


class ExactVerifier(VerifierTable):
    """Right when the text after the last marker equals the answer, white space aside."""

    type: Literal["exact"]
    """Picks this verifier."""
    marker: Annotated[str, Field(min_length=1)] | None = None
    """The answer stands after the last occurrence of this text. Unset: the whole completion is the answer."""


class NumericVerifier(VerifierTable):
    """Right when the last number of the completion equals the answer."""

    type: Literal["numeric"]
    """Picks this verifier."""
    tolerance: Annotated[float, Field(ge=0)] = 1e-6
    """Largest difference that still counts as equal, relative to max(1, |gold|). Up to the default, whole numbers must
    be equal exactly."""


class Gsm8kVerifier(VerifierTable):
    """Right when the number after the last `####` equals the one after the gold's last `####`."""

    type: Literal["gsm8k"]
    """Picks this verifier."""


class BoxedVerifier(VerifierTable):
    r"""Right when the last `\boxed{...}` holds the same LaTeX as the answer, spacing aside."""

    type: Literal["boxed"]
    """Picks this verifier."""


class MathVerifier(VerifierTable):
    r"""Right when the last `\boxed{...}`, or what is said to be the answer, means the gold answer, by math-verify."""

    type: Literal["math"]
    """Picks this verifier."""
    boxed_only: bool = False
    r"""Only a `\boxed{...}` is an answer, not what follows the last `####`, `answer is` or `answer:`."""
    max_length: Positive = 1000
    """Characters of an answer, at the most: a longer one is none."""


class ScoringVerifier(VerifierTable):
    """One that gives a score."""

    graded: bool = False
    """The score, from 0 to 1, is the reward; `threshold` then decides what counts as right, in accuracies alone."""
    threshold: float
    """Score from which an answer is right."""

    @property
    def gives_grades(self) -> bool:
        """Whether rewards are other than 0 and 1."""
        return self.graded

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.graded and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1 where graded, not {self.threshold:g}")
        return self


class ReasoningGymVerifier(ScoringVerifier):
    """Right when a task of reasoning-gym scores the answer high enough. Many of its tasks give partial credit."""

    type: Literal["reasoning_gym"]
    """Picks this verifier."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Score from which an answer is right."""
    marker: Annotated[str, Field(min_length=1)] | None = None
    """The answer stands after the last occurrence of this text. Unset: in the last `<answer>...</answer>`, else all."""


def _dotted(path: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", path):
        raise ValueError("must be MODULE.FUNCTION, as rewards.right for the function right of rewards.py")
    return path


def _with_answer(written: str) -> str:
    if "{answer}" not in written:
        raise ValueError("must hold {answer}, where the recorded answer stands")
    return written


DottedPath = Annotated[str, AfterValidator(_dotted)]
Written = Annotated[str, AfterValidator(_with_answer)]


SCRIPT_REWARDS = "trainer.reward_funcs"  # stands for the reward functions of a TRL script, which only the script has


class FunctionVerifier(ScoringVerifier):
    """A reward function of your own, with TRL's signature; it gets one completion at a time."""

    pure: ClassVar[bool] = False

    type: Literal["function"]
    """Picks this verifier."""
    path: DottedPath
    """`module.function`, importable where the run is started. It is code, and is run: use your own only."""
    threshold: float = 0.5
    """Reward from which a completion is right. None from the function excludes the row."""
    answer_as: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] = "answer"
    """Name of the keyword argument with the recorded answers (TRL's own functions: `solution`)."""
    messages: bool = False
    """Give completions as chat messages instead of text."""
    written: Written = "{answer}"
    """How a right completion writes the answer, for checks of the gold answers against themselves."""


class VerlVerifier(ScoringVerifier):
    """A `compute_score(data_source, solution_str, ground_truth, extra_info)` of verl, or one like it."""

    pure: ClassVar[bool] = False

    type: Literal["verl"]
    """Picks this verifier."""
    path: DottedPath = "verl.utils.reward_score.default_compute_score"
    """Where it is. It is code, and is run: use your own only."""
    threshold: float = 0.5
    """Score from which a completion is right."""
    data_source: str | None = None
    """The data source that it is told. Unset: each prompt's own."""
    written: Written = "{answer}"
    """How a right completion writes the answer, for checks of the gold answers against themselves."""


Verifier = Annotated[
    ExactVerifier
    | NumericVerifier
    | Gsm8kVerifier
    | BoxedVerifier
    | MathVerifier
    | ReasoningGymVerifier
    | FunctionVerifier
    | VerlVerifier,
    Field(discriminator="type"),
]


class VerificationConfig(Table):
    """The processes that verifiers run in."""

    processes: Annotated[int, Field(ge=1, le=1024)] = 2
    """How many, at the most."""
    seconds: PositiveNumber = 5.0
    """Wall-clock time for one answer; then the process is ended, the answer tried once more, and judged `timeout`."""
    memory_mb: Positive = 1024
    """MiB that judging may take beyond what a process has after start-up (where the system can limit it)."""
    start_seconds: PositiveNumber = 120.0
    """Time for a process to import what the verifier needs."""
