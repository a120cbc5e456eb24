"""The numbers of a run as typed records. Nothing in here reads a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cropi.functional.bootstrap import Interval


@dataclass(frozen=True)
class Cost:
    """The cost of a run. None: not charged, or not there yet."""

    collect: float | None = None  # seconds
    score: float | None = None
    select: float | None = None
    train: float | None = None
    evaluate: float | None = None  # shown, but not part of the total
    collect_tokens: int | None = None  # generated tokens
    train_tokens: int | None = None

    @property
    def total(self) -> float | None:
        """Seconds of collect, score, select and train; None before there is any training."""
        if self.train is None:
            return None
        return sum(seconds or 0.0 for seconds in (self.collect, self.score, self.select, self.train))

    @property
    def tokens(self) -> int | None:
        """Generated tokens, stored trajectories and training together; None before there is any training."""
        return None if self.train_tokens is None else self.train_tokens + (self.collect_tokens or 0)

    @property
    def selection_share(self) -> float | None:
        """(score + select) / train."""
        return ((self.score or 0.0) + (self.select or 0.0)) / self.train if self.train else None

    def as_json(self) -> dict[str, Any]:
        """The costs with what follows from them."""
        return asdict(self) | {"total": self.total, "tokens": self.tokens, "selection_share": self.selection_share}


@dataclass(frozen=True)
class Point:
    """Greedy accuracy at one step: the mean over the targeted test sets and over the others. None: no such set."""

    step: int
    targeted: Interval | None
    untargeted: Interval | None


@dataclass(frozen=True)
class Reliability:
    """Reliability of a stage's ranking, from the errors of its influence."""

    by_set: Mapping[str, float]  # share of the influence's variance that is not noise, by validation set
    best: int  # how many of the best ranked a plain selection takes
    expected_overlap: float  # share of those that is expected to belong there
    chance: float  # share of as many drawn at random among the prompts with signal


@dataclass(frozen=True)
class Drift:
    """Distance of a stage's policy from the behaviour policy, over the prompts with signal."""

    ratio_ess: float  # median effective sample size of a prompt's token ratios, as a share of its tokens
    clip_share: float  # mean share of the token ratios outside 1 - clip to 1 + clip
    kl: float  # mean KL(policy || behaviour policy) per token, in nats


@dataclass(frozen=True)
class StageQuality:
    """Quality of a stage's scores. None: not measured."""

    stage: int
    direction_reliability: Mapping[str, float | None]  # by validation set: would other prompts give its direction again
    reliability: Reliability | None
    drift: Drift | None


@dataclass(frozen=True)
class Summary:
    """A run in numbers."""

    name: str
    strategy: str
    seed: int
    total_steps: int
    evaluate_every: int
    fraction: float | None  # share of the pool that a stage selects; None: the strategy may take all
    pool: int | None  # training prompts to select from
    tested: bool  # whether the run has test sets
    base: Point | None
    base_by_set: Mapping[str, Mapping[str, Interval]]
    steps: int  # the last evaluated one, or of a run without test sets the last trained one; 0 before there is any
    curve: tuple[Point, ...]  # step 0 is the base policy
    final: Mapping[str, Mapping[str, Interval]]  # at `steps`: test set -> greedy, sampled; empty while `steps` is 0
    cost: Cost
    stages: tuple[StageQuality, ...]  # where the strategy scores by influence
    rewards: tuple[float | None, ...]  # mean reward of training by stage, as far as it has come
    reward_curve: tuple[tuple[float, float], ...]  # (step, mean reward of training) over neighbouring steps

    @property
    def finished(self) -> bool:
        """Whether `steps` are all."""
        return self.steps == self.total_steps

    @property
    def last(self) -> Point | None:
        """The point at the last evaluated step, None while there is none beyond the base policy."""
        return self.curve[-1] if self.curve and self.steps else None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values. Unknown numbers are null or absent, never NaN."""
        return asdict(self) | {"cost": self.cost.as_json()}
