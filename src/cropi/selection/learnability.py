"""Learnability: the variance of the reward."""

import numpy as np

from cropi.config import LearnabilityStrategy, SelectConfig
from cropi.functional import influence as functional
from cropi.selection.candidates import Candidates, Ranking


def learnability(candidates: Candidates, strategy: LearnabilityStrategy, config: SelectConfig) -> Ranking:
    """s_i = p_i (1 - p_i) (Foerster & Foster, arXiv 2502.12272), prompts of equal rewards left out.

    p_i is the pass rate of the stored trajectories; with `rescore`, the newest training reward of a prompt replaces it.
    """
    p_N = candidates.pass_rates_N
    if strategy.rescore:
        newest = candidates.training_pass_rates
        p_N = np.array([newest.get(i, p) for i, p in zip(candidates.prompt_ids, p_N, strict=True)])
    scores_N = np.nan_to_num(functional.learnability(p_N))
    return Ranking(scores_N, scores_N > 0, "p(1 - p) is large", {})
