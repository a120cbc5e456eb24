"""A bell curve over the pass rate that moves from easy to hard."""

from typing import ClassVar, Literal

import numpy as np

from cropi.curriculum.strategy import Candidates, FusionConfig, Need, Ranking, StrategyTable, gumbel_keys

FIRST, LAST = 0.8, 0.2  # middle of the curve at the first stage (easy prompts) and at the last (hard ones)
SIGMA = 0.2  # standard deviation of the curve


class GaussianStrategy(StrategyTable):
    """Prompts drawn by a bell curve over the pass rate, whose middle moves from easy to hard in equal steps."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories"})

    type: Literal["gaussian"]

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """Draw without replacement by w_i = exp(-(p_i - mu_t)^2 / (2 sigma^2)), p_i of the stored trajectories.

        mu_t = first + (last - first) t / (T - 1) at stage t of T: after the curriculum of Nemotron 3 Nano (arXiv
        2512.20848, section 3.2.2). It does not publish its numbers: first 0.8, last 0.2 and sigma 0.2 are ours.
        Nemotron draws batches from the mixture; here a stage draws its selection.
        """
        progress = candidates.stage / (candidates.stages - 1) if candidates.stages > 1 else 0.0
        middle = FIRST + (LAST - FIRST) * progress
        log_weights_N = -((np.nan_to_num(candidates.pass_rates_N) - middle) ** 2) / (2 * SIGMA**2)
        keys_N = gumbel_keys(candidates, "gaussian", log_weights_N)
        return Ranking(keys_N, candidates.rated_N, f"drawn around pass rate {middle:.2f}")
