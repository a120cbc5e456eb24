"""Random prompts from a band of pass rates."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from cropi.curriculum.strategy import Candidates, FusionConfig, Need, Ranking, StrategyTable
from cropi.setting_types import Fraction


class PassRateStrategy(StrategyTable):
    """Random prompts among those whose stored pass rate lies in a band."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories"})

    type: Literal["pass_rate"]
    low: Fraction = 0.2
    """Lowest pass rate kept."""
    high: Fraction = 0.8
    """Highest pass rate kept."""

    @model_validator(mode="after")
    def _ordered(self) -> PassRateStrategy:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
        return self

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """low <= p_i <= high on the stored trajectories, in random order (PRIME, arXiv 2502.01456: 0.2 and 0.8)."""
        p_N = candidates.pass_rates_N
        eligible_N = (p_N >= self.low) & (p_N <= self.high) & candidates.rated_N
        return Ranking(candidates.uniform_N("pass_rate"), eligible_N, f"pass rate in [{self.low:g}, {self.high:g}]")
