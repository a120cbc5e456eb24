"""Every prompt."""

import numpy as np

from cropi.config import FullStrategy, SelectConfig
from cropi.curriculum.candidates import Candidates, Ranking


def full(candidates: Candidates, strategy: FullStrategy, config: SelectConfig) -> Ranking:
    """s_i = 1 for every usable prompt: plain GRPO on the whole pool.

    With `train.dynamic_sampling` it is DAPO (arXiv 2503.14476): the trainer replaces groups of equal rewards.
    """
    return Ranking(np.ones(len(candidates)), candidates.usable_N, "the whole pool", {})
