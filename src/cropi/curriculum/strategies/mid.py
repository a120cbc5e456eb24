"""The middle of the pass rates."""

import numpy as np

from cropi.config import MidStrategy, SelectConfig
from cropi.curriculum.candidates import Candidates, Ranking


def mid(candidates: Candidates, strategy: MidStrategy, config: SelectConfig) -> Ranking:
    """s_i = 1/2 - |p_i - 1/2| on the stored trajectories (GradAlign's baseline AccGreedy, arXiv 2602.21492).

    p (1 - p) = 1/4 - (p - 1/2)^2, so for verdicts this is the order of static `learnability`. What differs: where too
    few prompts have signal, those of equal rewards fill the places, instead of a smaller selection. The published
    baseline has fresh trajectories at every round: `refresh.fraction: 1`.
    """
    p_N = candidates.pass_rates_N
    known_N = candidates.usable_N & ~np.isnan(p_N)
    scores_N = np.where(candidates.hopeful_N, 0.5 - np.abs(p_N - 0.5), 0.0)
    return Ranking(scores_N, known_N, "pass rate near 1/2", {})
