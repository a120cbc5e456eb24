"""Strategies: the ways to choose the prompts of a stage, one table each."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from cropi.config.base import Fraction, Table


class StrategyTable(Table):
    """What all strategies have in common."""

    reads_trajectories: ClassVar[bool] = False  # chooses by the stored trajectories, and so has to pay for them
    reads_scores: ClassVar[bool] = False  # needs `score`

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    """Name of the arm. Unset: the type. Two strategies of one type need names."""

    @property
    def arm(self) -> str:
        """Name of the arm."""
        return self.name or str(getattr(self, "type"))  # noqa: B009 - every strategy has one, of its own literal type

    def scored_stage(self, stage: int) -> int:
        """The stage whose scores count at a stage."""
        return stage

    @property
    def follows_trajectories(self) -> bool:
        """Whether newer trajectories make a difference to its later stages."""
        return self.reads_trajectories and self.scored_stage(1) == 1


class FullStrategy(StrategyTable):
    """Every prompt, every stage."""

    type: Literal["full"]
    """Picks this strategy."""


class RandomStrategy(StrategyTable):
    """A uniformly random subset."""

    type: Literal["random"]
    """Picks this strategy."""
    redraw: bool = False
    """Draw a new subset at every stage instead of one for the whole run."""


class PassRateStrategy(StrategyTable):
    """Random prompts among those whose stored pass rate lies in a band."""

    reads_trajectories: ClassVar[bool] = True

    type: Literal["pass_rate"]
    """Picks this strategy."""
    low: Fraction = 0.2
    """Lowest pass rate kept."""
    high: Fraction = 0.8
    """Highest pass rate kept."""

    @model_validator(mode="after")
    def _ordered(self) -> PassRateStrategy:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
        return self


class LearnabilityStrategy(StrategyTable):
    """The prompts with the largest p (1 - p)."""

    reads_trajectories: ClassVar[bool] = True

    type: Literal["learnability"]
    """Picks this strategy."""
    rescore: bool = False
    """Take p from the newest training rewards of a prompt where it has been trained on."""


class InfluenceStrategy(StrategyTable):
    """The prompts whose off-policy gradient points most along the validation sets' (CROPI)."""

    reads_trajectories: ClassVar[bool] = True
    reads_scores: ClassVar[bool] = True

    type: Literal["influence"]
    """Picks this strategy."""
    static: bool = False
    """Score once, at the base policy, instead of at every stage."""

    def scored_stage(self, stage: int) -> int:
        return 0 if self.static else stage


Strategy = Annotated[
    FullStrategy | RandomStrategy | PassRateStrategy | LearnabilityStrategy | InfluenceStrategy,
    Field(discriminator="type"),
]
