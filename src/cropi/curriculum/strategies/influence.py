"""CROPI: influence on the validation sets, fused."""

from typing import ClassVar, Literal

import numpy as np

from cropi.curriculum.strategy import Candidates, FusionConfig, Need, Ranking, StrategyTable, fused_ranking


class InfluenceStrategy(StrategyTable):
    """The prompts whose off-policy gradients are most aligned with those of the validation sets (CROPI)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories", "gradients", "validation"})

    type: Literal["influence"]
    static: bool = False
    """Score once, at the base policy, instead of at every stage."""
    order: Literal["top", "bottom", "shuffled"] = "top"
    """Negative controls: `bottom` ranks by -influence; `shuffled` permutes influence at random."""

    def scored_stage(self, stage: int) -> int:
        return 0 if self.static else stage

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """s_i = sum_v 1 / (kappa + rank_v(i)), rank_v by influence on validation set v (paper: POPI scores, RRF).

        Only prompts with signal are eligible: all others have a zero gradient and no influence.

        Negative controls with the same eligible prompts: `bottom` takes those with the lowest influence (GradAlign's
        `negsim`); `shuffled` permutes influence among the prompts with signal, in the same way for all sets and anew at
        each stage.
        """
        eligible_N = candidates.mixed_N
        values = dict(candidates.influence)
        if self.order == "bottom":
            values = {name: -values_N for name, values_N in values.items()}
        elif self.order == "shuffled":
            values = {name: _shuffled(candidates, values_N, eligible_N) for name, values_N in values.items()}
        reason = {"top": "influence", "bottom": "least influence", "shuffled": "shuffled influence"}[self.order]
        return fused_ranking(values, eligible_N, size, fusion, reason)


def _shuffled(candidates: Candidates, values_N: np.ndarray, eligible_N: np.ndarray) -> np.ndarray:
    rows, shuffled_N = np.flatnonzero(eligible_N), values_N.copy()
    draws = candidates.uniform_N("shuffle", candidates.stage)[rows]
    shuffled_N[rows] = values_N[rows][np.argsort(draws, kind="stable")]
    return shuffled_N
