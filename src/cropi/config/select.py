"""Settings of selection."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cropi.curriculum.strategies import Strategy
from cropi.curriculum.strategy import FusionConfig
from cropi.setting_types import Fraction, Name, Table


class SelectConfig(Table):
    """Selection of the prompts that a stage trains on."""

    strategy: Strategy
    """The strategy: how the prompts of a stage are chosen."""
    name: Name | None = None
    """Name of the strategy in reports. Unset: the preset that `strategy` names, or its type."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Alpha: ceil(alpha N) prompts are selected (paper: 0.1)."""
    fusion: FusionConfig = FusionConfig()
    """Fusion of the rankings of several validation sets."""
    exploration: Fraction = 0.0
    """Share of the selection drawn at random from all prompts that the strategy did not choose."""
    quotas: dict[str, Fraction] = Field(default={})
    """Largest share of a selection that a source may take, by source: floor(share x size) places, at least one."""

    @property
    def label(self) -> str:
        """Name of the strategy in reports, and a part of the seeds of samples at later stages."""
        return self.name or self.strategy.type
