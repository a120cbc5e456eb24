"""DOTS: a target difficulty."""

import numpy as np

from cropi.config import DotsStrategy, SelectConfig
from cropi.curriculum.candidates import Candidates, Ranking
from cropi.curriculum.draw import gumbel_keys


def dots(candidates: Candidates, strategy: DotsStrategy, config: SelectConfig) -> Ranking:
    """A draw without replacement by w_i = exp(-|p_i - alpha| / tau) (DOTS, arXiv 2506.05316; released code: tau 1e-3).

    Published: p_i is predicted at every step from 256 prompts that are sampled anew, by the embeddings' attention to
    them, and old rollouts are replayed. Here p_i is of the stored trajectories (newer ones with `refresh`), which are
    paid for in full; a stage is one draw, and nothing is replayed.
    """
    p_N = candidates.pass_rates_N
    eligible_N = candidates.hopeful_N
    keys_N = gumbel_keys(candidates, "dots", -np.abs(np.nan_to_num(p_N) - strategy.target) / strategy.temperature)
    return Ranking(keys_N, eligible_N, f"drawn near pass rate {strategy.target:g}", {})
