"""VCRL: groups whose rewards vary enough."""

import numpy as np
from jaxtyping import Float, Int

from cropi.config import SelectConfig, VcrlStrategy
from cropi.curriculum.candidates import Candidates, Ranking
from cropi.seeds import unit_interval


def vcrl(candidates: Candidates, strategy: VcrlStrategy, config: SelectConfig) -> Ranking:
    """Var_i / Var_max >= kappa, in random order (VCRL, arXiv 2509.19803); Var_i of the rewards of the stored group.

    Published: groups of the batch that pass are trained on, and replayed from a memory bank where too few do. Here a
    stage draws from all prompts of the pool that pass by their stored trajectories, anew at each stage; there is no
    bank.
    """
    assert candidates.group_sizes_N is not None
    variance_N = normalised_variance(candidates.variances_N, candidates.group_sizes_N)
    keys = [unit_interval(candidates.seed, "vcrl", candidates.stage, i) for i in candidates.prompt_ids]
    eligible_N = variance_N >= strategy.kappa - 1e-12  # a group that has kappa exactly has it in spite of rounding
    return Ranking(
        np.array(keys), eligible_N & (variance_N > 0), f"variance at least {strategy.kappa:g} of the most", {}
    )


def normalised_variance(
    variances_N: Float[np.ndarray, " N"], sizes_N: Int[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """K^2 Var / (floor(K/2) ceil(K/2)): the variance of a group's K rewards over the largest that K rewards from 0 to 1
    can have, that of half zeros and half ones. For c right verdicts, c (K - c) over it. 0 where there is none."""
    most_N = (sizes_N // 2) * ((sizes_N + 1) // 2)
    spread_N = np.nan_to_num(variances_N) * sizes_N**2
    return np.divide(spread_N, most_N, out=np.zeros(len(variances_N)), where=most_N > 0)
