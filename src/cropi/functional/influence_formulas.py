"""Formulas of influence: inner products, cosines and gains of gradients, and cosines with a sample. NumPy only."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

Score = Literal["dot", "cosine", "gain"]


def mean_weights(
    norms_M: Float[np.ndarray, " M"], mean: Literal["plain", "normalized"], count: int
) -> Float[np.ndarray, " M"]:
    """Weights w_m of the direction of a validation set, sum_m w_m g_m, for some of its `count` prompts.

    `plain`: 1/M, the gradient of the mean surrogate, so that <g_i, d> is the mean of <g_i, g_m>. `normalized`:
    1/(M |g_m|), equal weight for every prompt; a zero gradient has weight 0.
    """
    if mean == "plain":
        return np.full(len(norms_M), 1 / count)
    return np.divide(1 / count, norms_M, out=np.zeros(len(norms_M)), where=norms_M != 0)


def influence(
    products_NV: Float[np.ndarray, "N V"],
    norms_N: Float[np.ndarray, " N"],
    norms_V: Float[np.ndarray, " V"],
    score: Score = "dot",
    variances_N: Float[np.ndarray, " N"] | None = None,
) -> Float[np.ndarray, "N V"]:
    """Influence of N prompts on V validation sets from inner products <g_i, d_v> (paper: the product of gradients).

    `dot`: <g_i, d_v>, the first-order gain of the validation objective from a step along g_i.
    `cosine`: <g_i, d_v> / (|g_i| |d_v|), the gain of a step of fixed length (what the paper's experiments rank by).
    `gain`: cosine x standard deviation of the prompt's rewards (`variances_N`), sqrt(p_i (1 - p_i)) for verdicts. Ours:
    the `dot` of gradients whose advantages are divided by their deviation, if the mean log-likelihood gradients of
    right and wrong completions were equally far apart for every prompt. Other differences in length count as noise.
    A zero vector on either side gives 0; non-finite numbers stay non-finite. `dot` does not need norms.
    """
    if score == "dot":
        return products_NV
    norms_NV = norms_N[:, None] * norms_V
    with np.errstate(invalid="ignore"):
        cosines_NV = np.divide(products_NV, norms_NV, out=np.zeros(products_NV.shape), where=norms_NV != 0)
    if score == "cosine":
        return cosines_NV
    assert variances_N is not None, "gain needs the variances of the rewards"
    return cosines_NV * np.sqrt(variances_N)[:, None]


def reward_variance(rewards_XK: Float[np.ndarray, "*X K"]) -> Float[np.ndarray, "*X"]:
    """Population variance of each group's rewards, m (1 - m) - mean[r (1 - r)] with m their mean.

    For verdicts, 0 and 1, this is p (1 - p) to the bit: learnability (Foerster & Foster, arXiv 2502.12272). Equal
    rewards give exactly 0; non-finite rewards, or none, give NaN.
    """
    rewards_XK = np.asarray(rewards_XK, dtype=np.float64)
    if not rewards_XK.shape[-1]:
        return np.full(rewards_XK.shape[:-1], np.nan)
    with np.errstate(invalid="ignore"):
        mean_X = rewards_XK.mean(axis=-1)
        variance_X = mean_X * (1 - mean_X) - (rewards_XK * (1 - rewards_XK)).mean(axis=-1)
    equal_X = (rewards_XK == rewards_XK[..., :1]).all(axis=-1) & np.isfinite(mean_X)
    return np.where(equal_X, 0.0, np.maximum(variance_X, 0.0))


def halves(keys: Mapping[str, float], count: int) -> tuple[list[str], list[str]]:
    """Deal the `count` ids of the smallest keys (ties by id) in turn to two halves, each in ascending order.

    Uses all ids if there are fewer.
    """
    drawn = sorted(keys, key=lambda i: (keys[i], i))[:count]
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
