"""Learnability: the variance of the reward."""

from typing import ClassVar, Literal

import numpy as np

from cropi.curriculum.strategy import Candidates, FusionConfig, Need, Ranking, StrategyTable


class LearnabilityStrategy(StrategyTable):
    """The prompts with the largest p (1 - p)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories", "rewards"})

    type: Literal["learnability"]
    rescore: bool = False
    """Take p from the newest training rewards of a prompt once it has been trained on."""

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """s_i = p_i (1 - p_i) (Foerster & Foster, arXiv 2502.12272); prompts with equal rewards are left out.

        p_i is the pass rate of the stored trajectories, or with `rescore` that of the newest training rewards. Graded
        rewards use their variance, which equals p_i (1 - p_i) for verdicts.
        """
        variances_N = candidates.variances_N
        if self.rescore:
            newest = candidates.training_variances
            variances_N = np.array([newest.get(i, v) for i, v in zip(candidates.prompt_ids, variances_N, strict=True)])
        scores_N = np.nan_to_num(variances_N)
        return Ranking(scores_N, scores_N > 0, "p(1 - p) is large")
