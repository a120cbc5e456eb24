"""VCRL: groups whose rewards vary enough."""

import numpy as np
from jaxtyping import Float, Int

from cropi.config import SelectConfig, VcrlStrategy
from cropi.seeds import unit_interval
from cropi.selection.candidates import Candidates, Ranking


def vcrl(candidates: Candidates, strategy: VcrlStrategy, config: SelectConfig) -> Ranking:
    """Var_i / Var_max >= kappa, in random order (VCRL, arXiv 2509.19803); Var_i of the rewards of the stored group.

    Published: groups of the batch that pass are trained on, and replayed from a memory bank where too few do. Here a
    stage draws from all prompts of the pool that pass by their stored trajectories, anew at each stage; there is no
    bank.
    """
    assert candidates.group_sizes_N is not None
    variance_N = normalised_variance(candidates.pass_rates_N, candidates.group_sizes_N)
    keys = [unit_interval(candidates.seed, "vcrl", candidates.stage, i) for i in candidates.prompt_ids]
    eligible_N = variance_N >= strategy.kappa - 1e-12  # a group that has kappa exactly has it in spite of rounding
    return Ranking(
        np.array(keys), eligible_N & (variance_N > 0), f"variance at least {strategy.kappa:g} of the most", {}
    )


def normalised_variance(p_N: Float[np.ndarray, " N"], sizes_N: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """c (K - c) / (floor(K/2) ceil(K/2)) with c = p K right answers of K: the variance of a group's verdicts over the
    largest that K verdicts can have. 0 where there is none."""
    right_N = np.nan_to_num(p_N) * sizes_N
    most_N = (sizes_N // 2) * ((sizes_N + 1) // 2)
    return np.divide(right_N * (sizes_N - right_N), most_N, out=np.zeros(len(p_N)), where=most_N > 0)
