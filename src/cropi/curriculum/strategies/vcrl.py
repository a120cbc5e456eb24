"""VCRL: groups whose rewards vary enough."""

from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int

from cropi.curriculum.strategy import Candidates, FusionConfig, Need, Ranking, StrategyTable

KAPPA = 0.8  # least variance of a group's rewards, as a share of the largest possible variance (paper)


class VcrlStrategy(StrategyTable):
    """Random prompts among those whose rewards vary by at least 0.8 of the largest possible variance (VCRL)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories"})

    type: Literal["vcrl"]

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """Var_i / Var_max >= kappa, in random order (VCRL, arXiv 2509.19803); Var_i of the rewards of the stored group.

        Published: groups of the batch that pass are trained on, and a memory bank replays earlier ones if too few pass.
        Here each stage draws from all prompts of the pool whose stored trajectories pass; there is no bank.
        """
        assert candidates.group_sizes_N is not None
        variance_N = normalised_variance(candidates.variances_N, candidates.group_sizes_N)
        eligible_N = variance_N >= KAPPA - 1e-12  # rounding must not exclude a group at exactly kappa
        reason = f"variance at least {KAPPA:g} of the most"
        return Ranking(candidates.uniform_N("vcrl", candidates.stage), eligible_N & (variance_N > 0), reason)


def normalised_variance(
    variances_N: Float[np.ndarray, " N"], sizes_N: Int[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """K^2 Var / (floor(K/2) ceil(K/2)): the variance of a group's K rewards over its largest possible value.

    K rewards in [0, 1] vary most if half of them are 0 and half 1. For c right verdicts the numerator is c (K - c).
    Groups without rewards get 0.
    """
    most_N = (sizes_N // 2) * ((sizes_N + 1) // 2)
    spread_N = np.nan_to_num(variances_N) * sizes_N**2
    return np.divide(spread_N, most_N, out=np.zeros(len(variances_N)), where=most_N > 0)
