"""A uniformly random subset."""

from typing import Literal

from cropi.curriculum.strategy import Candidates, FusionConfig, Ranking, StrategyTable


class RandomStrategy(StrategyTable):
    """A uniformly random subset: the control that the paper lacks."""

    type: Literal["random"]
    redraw: bool = False
    """Draw a new subset at every stage instead of one for the whole run."""

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """s_i = u(seed, i), or u(seed, stage, i) with `redraw`: independent uniform numbers.

        Prompts without signal take part: they may have gained one since they were sampled.
        """
        purpose = ("random", candidates.stage) if self.redraw else ("random",)
        return Ranking(candidates.uniform_N(*purpose), candidates.usable_N, "drawn at random")
