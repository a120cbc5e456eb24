"""Every prompt."""

from typing import ClassVar, Literal

import numpy as np

from cropi.curriculum.strategy import Candidates, FusionConfig, Ranking, StrategyTable


class FullStrategy(StrategyTable):
    """Every prompt, every stage.

    With `train.dynamic_sampling` this is DAPO (arXiv 2503.14476): the trainer replaces groups of equal rewards.
    """

    takes_all: ClassVar[bool] = True

    type: Literal["full"]

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """s_i = 1 for every usable prompt: plain GRPO on the whole pool."""
        return Ranking(np.ones(len(candidates)), candidates.usable_N, "the whole pool")
