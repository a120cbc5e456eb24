"""Learnability: the variance of the reward."""

import numpy as np

from cropi.config import LearnabilityStrategy, SelectConfig
from cropi.curriculum.candidates import Candidates, Ranking


def learnability(candidates: Candidates, strategy: LearnabilityStrategy, config: SelectConfig) -> Ranking:
    """s_i = p_i (1 - p_i) (Foerster & Foster, arXiv 2502.12272), prompts of equal rewards left out.

    p_i is the pass rate of the stored trajectories; with `rescore`, that of a prompt's newest training rewards replaces
    it. Of graded rewards it is the variance, which p_i (1 - p_i) is for verdicts.
    """
    variances_N = candidates.variances_N
    if strategy.rescore:
        newest = candidates.training_variances
        variances_N = np.array([newest.get(i, v) for i, v in zip(candidates.prompt_ids, variances_N, strict=True)])
    scores_N = np.nan_to_num(variances_N)
    return Ranking(scores_N, scores_N > 0, "p(1 - p) is large", {})
