"""Mean cosine of each prompt's gradient to those of a sample of the pool. NumPy only."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float


def halves(keys: Mapping[str, float], count: int) -> tuple[list[str], list[str]]:
    """Deal the `count` ids of the smallest keys (ties by id) in turn to two halves, each in ascending order.

    Uses all ids if there are fewer. Raises ValueError if a half would be empty.
    """
    drawn = sorted(keys, key=lambda i: (keys[i], i))[:count]
    if len(drawn) < 2:
        raise ValueError(f"{len(drawn)} ids cannot fill two halves")
    return sorted(drawn[::2]), sorted(drawn[1::2])


def mean_cosines(
    products_N2: Float[np.ndarray, "N 2"], lengths_N: Float[np.ndarray, " N"], in_half_N2: Bool[np.ndarray, "N 2"]
) -> Float[np.ndarray, " N"]:
    """c_i = mean of cos(g_i, g_j) over the sampled prompts j, or over the half that i does not belong to.

    Input are products <g_i, d_h> with d_h = (1/M_h) sum_{j in h} g_j / |g_j|, so that <g_i, d_h> / |g_i| is the mean
    cosine with a half. No prompt is compared with itself, which would favour the sampled ones. 0 if g_i is 0.
    """
    cosines_N2 = np.divide(
        products_N2, lengths_N[:, None], out=np.zeros(products_N2.shape), where=lengths_N[:, None] > 0
    )
    weights_N2 = np.where(in_half_N2.any(axis=1, keepdims=True), ~in_half_N2, in_half_N2.sum(axis=0))
    return (weights_N2 * cosines_N2).sum(axis=1) / weights_N2.sum(axis=1)
