"""DOTS: a target difficulty."""

from typing import ClassVar, Literal

import numpy as np

from cropi.curriculum.strategy import Candidates, FusionConfig, Need, Ranking, StrategyTable, gumbel_keys

TARGET = 0.5  # alpha, the target pass rate (released code)
TEMPERATURE = 1e-3  # tau (released code); so small a value takes the nearest prompts and draws among equals


class DotsStrategy(StrategyTable):
    """Prompts drawn by their distance from pass rate 1/2 (DOTS)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories"})

    type: Literal["dots"]

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """Draw without replacement by w_i = exp(-|p_i - alpha| / tau) (DOTS, arXiv 2506.05316).

        Published: at every step p_i is predicted from 256 newly sampled prompts by attention between embeddings, and
        old rollouts are replayed. Here p_i comes from the stored trajectories, whose cost
        is charged in full; a stage is one draw, without replay.
        """
        distances_N = np.abs(np.nan_to_num(candidates.pass_rates_N) - TARGET)
        keys_N = gumbel_keys(candidates, "dots", -distances_N / TEMPERATURE)
        return Ranking(keys_N, candidates.rated_N, f"drawn near pass rate {TARGET:g}")
