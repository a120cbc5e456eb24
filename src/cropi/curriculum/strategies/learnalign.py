"""After LearnAlign: learnable prompts whose gradients agree with those of many others."""

from typing import ClassVar, Literal

import numpy as np

from cropi.curriculum.strategy import CANDIDATES, Candidates, FusionConfig, Need, Ranking, StrategyTable
from cropi.functional.influence_formulas import halves, mean_cosines
from cropi.seeds import unit_interval


class LearnAlignStrategy(StrategyTable):
    """Learnable prompts whose gradients are aligned with those of 200 random prompts of the pool (after LearnAlign)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories", "gradients"})
    reads_lengths: ClassVar[bool] = True
    candidates_aimed_at: ClassVar[int] = 200

    type: Literal["learnalign"]

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """s_i = p_i (1 - p_i) x mean_j cos(g_i, g_j) over sampled prompts j of the pool: no validation set.

        After LearnAlign (arXiv 2506.11480): gradient alignment among the candidates, with success-rate learnability in
        place of the gradient's length; written from the published description, without its code. Published: all pairs
        of candidates. Here: pairs with a random sample, by the run's own off-policy gradients at every stage. The
        sample has two halves; its own prompts are compared with the other half.
        """
        assert candidates.lengths_N is not None
        with_signal_N = candidates.mixed_N
        mixed = [i for i, signal in zip(candidates.prompt_ids, with_signal_N, strict=True) if signal]
        keys = {i: unit_interval(candidates.seed, "candidates", i) for i in mixed}
        members = [set(half) for half in halves(keys, self.candidates_aimed_at)]
        in_half_N2 = np.array([[i in half for half in members] for i in candidates.prompt_ids])
        products_N2 = np.stack([candidates.influence[name] for name in CANDIDATES], axis=1)
        cosines_N = mean_cosines(products_N2, np.nan_to_num(candidates.lengths_N), in_half_N2)
        scores_N = np.nan_to_num(candidates.variances_N) * cosines_N
        return Ranking(scores_N, with_signal_N, "aligned with the pool and learnable")
