"""Strategies, and what they choose from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cropi.config.base import Fraction, Table
from cropi.config.strategies import Strategy


class FusionConfig(Table):
    """Reciprocal Rank Fusion over validation sets: sum over sets of 1 / (kappa + rank)."""

    kappa: Annotated[float, Field(ge=0)] = 60.0
    """Larger values even out the head of the lists (60: Cormack et al. 2009; the paper's code: 0)."""
    truncate: bool = False
    """Rank only the first ceil(fraction N) of each list; others add nothing (the paper's code: true, with floor)."""


class SelectConfig(Table):
    """Which prompts a stage trains on."""

    strategy: Strategy
    """The strategy: how the prompts of a stage are chosen."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Alpha: ceil(alpha N) prompts are selected (paper: 0.1)."""
    fusion: FusionConfig = FusionConfig()
    """How the rankings of several validation sets become one."""
    exploration: Fraction = 0.0
    """Share of the selection drawn at random from the prompts the strategy left out, those without signal included."""
    quotas: dict[str, Fraction] = Field(default={})
    """Largest share of a selection that a source may take, by source: floor(share x size) places, at least one."""
