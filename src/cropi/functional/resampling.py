"""Errors of scores from the K trajectories behind each. NumPy only."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def leave_one_out(count: int) -> Int[np.ndarray, "K K-1"]:
    """Row k: all indices but k."""
    return np.array([[j for j in range(count) if j != k] for k in range(count)]).reshape(count, count - 1)


def jackknife_error(estimates_KV: Float[np.ndarray, "K V"]) -> Float[np.ndarray, " V"]:
    """Standard error from the estimates without trajectory k (Quenouille 1949, Tukey 1958):

    s^2 = (K - 1) / K sum_k (estimate_k - their mean)^2. It errs upwards, by about 1 / K of itself for advantages
    against the group's mean (Efron and Stein 1981). NaN for fewer than three: a group of two without one has no
    advantages.
    """
    count = len(estimates_KV)
    if count < 3:
        return np.full(estimates_KV.shape[1], np.nan)
    deviations_KV = estimates_KV - estimates_KV.mean(axis=0)
    return np.sqrt((count - 1) / count * (deviations_KV**2).sum(axis=0))
