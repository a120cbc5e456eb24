"""Pass rates nearest to a half."""

from typing import ClassVar, Literal

import numpy as np

from cropi.curriculum.strategy import Candidates, FusionConfig, Need, Ranking, StrategyTable


class MidStrategy(StrategyTable):
    """The prompts whose pass rate is nearest to a half."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories"})

    type: Literal["mid"]

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """s_i = 1/2 - |p_i - 1/2| on the stored trajectories (GradAlign's baseline AccGreedy, arXiv 2602.21492).

        p (1 - p) = 1/4 - (p - 1/2)^2, so for verdicts this is the order of static `learnability`. The difference: if
        too few prompts have signal, those with equal rewards fill the places. The published baseline samples new
        trajectories at every round.
        """
        p_N = candidates.pass_rates_N
        known_N = candidates.usable_N & ~np.isnan(p_N)
        scores_N = np.where(candidates.rated_N, 0.5 - np.abs(p_N - 0.5), 0.0)
        return Ranking(scores_N, known_N, "pass rate near 1/2")
