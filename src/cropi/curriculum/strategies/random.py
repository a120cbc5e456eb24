"""A uniformly random subset."""

import numpy as np

from cropi.config import RandomStrategy, SelectConfig
from cropi.curriculum.candidates import Candidates, Ranking
from cropi.seeds import unit_interval


def random(candidates: Candidates, strategy: RandomStrategy, config: SelectConfig) -> Ranking:
    """s_i = u(seed, i), or u(seed, stage, i) with `redraw`: uniform numbers that depend on nothing else.

    The control that the paper lacks. Prompts without signal take part: they may have one by now.
    """
    purpose = ("random", candidates.stage) if strategy.redraw else ("random",)
    scores_N = np.array([unit_interval(candidates.seed, *purpose, i) for i in candidates.prompt_ids])
    return Ranking(scores_N, candidates.usable_N, "drawn at random", {})
