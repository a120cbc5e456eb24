"""Our own: prompts chosen batch by batch while training runs."""

from typing import ClassVar, Literal

import numpy as np

from cropi.curriculum.strategy import Candidates, FusionConfig, Need, Ranking, StrategyTable


class CropiStrategy(StrategyTable):
    """Prompts chosen for each generation batch by influence that is read from training's own backward passes.

    Nothing of the pool is collected or scored. Only the validation prompts are sampled, to find directions.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"validation", "rewards"})
    takes_all: ClassVar[bool] = True
    chooses_online: ClassVar[bool] = True

    type: Literal["cropi"]
    """Selects this strategy."""
    observe_only: bool = False
    """Read influence and report it, but train on the whole pool as `full` does."""

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """s_i = 1 for every usable prompt: a stage may train on any, and each generation batch is chosen on its own."""
        return Ranking(np.ones(len(candidates)), candidates.usable_N, "chosen batch by batch")
