"""The numbers of a run as typed records. Nothing in here reads a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cropi.functional.bootstrap import Interval


@dataclass(frozen=True)
class Cost:
    """What an arm has cost. None: not charged to this arm, or not there yet."""

    collect: float | None = None  # seconds
    score: float | None = None
    select: float | None = None
    train: float | None = None
    evaluate: float | None = None  # shown, but not part of the total: it decides nothing
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
    """What the errors of a stage's influence say of its ranking."""

    by_set: Mapping[str, float]  # share of the influence's variance that is not noise, by validation set
    best: int  # how many of the best ranked a plain selection takes
    expected_overlap: float  # share of those that is expected to belong there
    chance: float  # share of as many drawn at random among the prompts with signal


@dataclass(frozen=True)
class Drift:
    """How far a stage's policy is from the one that sampled, over the prompts with signal."""

    ratio_ess: float  # median effective sample size of a prompt's token ratios, as a share of its tokens
    clip_share: float  # mean share of the token ratios outside 1 - clip to 1 + clip
    kl: float  # mean KL(policy || behaviour policy) per token, in nats


@dataclass(frozen=True)
class StageWorth:
    """What a stage's scores are worth. None: not measured."""

    stage: int
    direction_reliability: Mapping[str, float | None]  # by validation set: would other prompts give its direction again
    reliability: Reliability | None
    drift: Drift | None


@dataclass(frozen=True)
class ArmSummary:
    """What is known of one arm."""

    name: str
    steps: int  # the last evaluated step; 0 before there is any
    finished: bool  # whether that is the run's last step
    curve: tuple[Point, ...]  # step 0 is the base policy
    final: Mapping[str, Mapping[str, Interval]]  # at `steps`: test set -> greedy, sampled; empty while `steps` is 0
    steps_to_target: int | None  # first evaluated step at `full`'s final targeted accuracy; None: not reached
    seconds_to_target: float | None  # the cost up to that step, by the rules of Cost.total
    cost: Cost
    stages: tuple[StageWorth, ...]  # of an arm that is scored by influence, by stage
    rewards: tuple[float | None, ...]  # mean reward of training by stage, as far as it has come

    @property
    def last(self) -> Point | None:
        """The point at the last evaluated step, None while there is none beyond the base policy."""
        return self.curve[-1] if self.steps else None


@dataclass(frozen=True)
class Difference:
    """Targeted accuracy of the main arm minus another arm's, at one step, on the same questions."""

    main: str
    other: str
    step: int  # the last one evaluated for both
    questions: int
    accuracy: Interval


@dataclass(frozen=True)
class Summary:
    """A run in numbers, the main arm first."""

    name: str
    seed: int
    total_steps: int
    evaluate_every: int
    confidence: float
    fraction: float  # share of the pool that a stage selects
    pool: int | None  # training prompts to select from
    tested: bool  # whether the run has test sets
    base: Point | None
    base_by_set: Mapping[str, Mapping[str, Interval]]
    arms: tuple[ArmSummary, ...]
    differences: tuple[Difference, ...]
    target: float | None  # `full`'s final targeted accuracy; None without a finished `full`
    shared_seconds: Mapping[str, float]  # work for all arms (collection, base evaluation), by phase

    @property
    def main(self) -> ArmSummary:
        """The arm of select.strategy."""
        return self.arms[0]

    def arm(self, name: str) -> ArmSummary | None:
        """An arm by name."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values. No value is NaN: what is not known is null or absent."""
        arms = [asdict(arm) | {"cost": arm.cost.as_json()} for arm in self.arms]
        return asdict(self) | {"arms": arms}
