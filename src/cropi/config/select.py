"""Strategies, and what they choose from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cropi.config.base import Fraction, Table


class FusionConfig(Table):
    """Reciprocal Rank Fusion over validation sets: sum over sets of 1 / (kappa + rank)."""

    kappa: Annotated[float, Field(ge=0)] = 60.0
    """Larger values even out the head of the lists (60: Cormack et al. 2009; the paper's code: 0)."""
    truncate: bool = False
    """Rank only the first ceil(fraction N) of each list; others add nothing (the paper's code: true, with floor)."""


class FullStrategy(Table):
    """Every prompt, every stage."""

    type: Literal["full"]
    """Picks this strategy."""


class RandomStrategy(Table):
    """A uniformly random subset."""

    type: Literal["random"]
    """Picks this strategy."""
    redraw: bool = False
    """Draw a new subset at every stage instead of one for the whole run."""


class PassRateStrategy(Table):
    """Random prompts among those whose stored pass rate lies in a band."""

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


class LearnabilityStrategy(Table):
    """The prompts with the largest p (1 - p)."""

    type: Literal["learnability"]
    """Picks this strategy."""
    rescore: bool = False
    """Take p from the newest training rewards of a prompt where it has been trained on."""


class InfluenceStrategy(Table):
    """The prompts whose off-policy gradient points most along the validation sets' (CROPI)."""

    type: Literal["influence"]
    """Picks this strategy."""
    static: bool = False
    """Score once, at the base policy, instead of at every stage."""


Strategy = Annotated[
    FullStrategy | RandomStrategy | PassRateStrategy | LearnabilityStrategy | InfluenceStrategy,
    Field(discriminator="type"),
]


class SelectConfig(Table):
    """Which prompts a stage trains on."""

    strategy: Strategy
    """The strategy of the main arm."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Alpha: ceil(alpha N) prompts are selected (paper: 0.1)."""
    fusion: FusionConfig = FusionConfig()
    """How the rankings of several validation sets become one."""
    exploration: Fraction = 0.0
    """Share of the selection drawn at random from the prompts the strategy left out, those without signal included."""
    quotas: dict[str, Fraction] = Field(default={})
    """Largest share of a selection that a source may take, by source: floor(share x size) places, at least one."""
