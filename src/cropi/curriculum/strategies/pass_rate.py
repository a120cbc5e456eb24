"""Random prompts from a band of pass rates."""

import numpy as np

from cropi.config import PassRateStrategy, SelectConfig
from cropi.curriculum.candidates import Candidates, Ranking
from cropi.seeds import unit_interval


def pass_rate(candidates: Candidates, strategy: PassRateStrategy, config: SelectConfig) -> Ranking:
    """low <= p_i <= high on the stored trajectories, in random order (PRIME, arXiv 2502.01456: 0.2 and 0.8)."""
    p_N = candidates.pass_rates_N
    scores_N = np.array([unit_interval(candidates.seed, "pass_rate", i) for i in candidates.prompt_ids])
    eligible_N = (p_N >= strategy.low) & (p_N <= strategy.high) & candidates.hopeful_N
    return Ranking(scores_N, eligible_N, f"pass rate in [{strategy.low:g}, {strategy.high:g}]", {})
