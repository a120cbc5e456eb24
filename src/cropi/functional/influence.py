"""Influence: how far a training prompt's gradient points along a validation set's. NumPy only."""

from typing import Literal

import numpy as np
from jaxtyping import Float

Score = Literal["dot", "cosine", "gain"]


def mean_weights(
    norms_M: Float[np.ndarray, " M"], mean: Literal["plain", "normalized"] = "plain", count: int | None = None
) -> Float[np.ndarray, " M"]:
    """Weights w_m with which the direction of a validation set is sum_m w_m g_m; `count` is the set's size where these
    are some of its prompts.

    `plain`: 1/M, the gradient of the mean surrogate, so that <g_i, d> is the mean of <g_i, g_m>. `normalized`:
    1/(M |g_m|), in which no prompt weighs more than another; a zero gradient keeps weight 0. Raises ValueError when
    the set is empty.
    """
    count = len(norms_M) if count is None else count
    if not count:
        raise ValueError("cannot take the mean of no gradients")
    if mean == "plain":
        return np.full(len(norms_M), 1 / count)
    return np.divide(1 / count, norms_M, out=np.zeros(len(norms_M)), where=norms_M != 0)


def influence(
    products_NV: Float[np.ndarray, "N V"],
    norms_N: Float[np.ndarray, " N"],
    norms_V: Float[np.ndarray, " V"],
    score: Score = "dot",
    pass_rates_N: Float[np.ndarray, " N"] | None = None,
) -> Float[np.ndarray, "N V"]:
    """Influence of N prompts on V validation sets from inner products <g_i, d_v> (paper: the product of gradients).

    `dot`: <g_i, d_v>, the first-order gain of the validation objective from a step along g_i.
    `cosine`: <g_i, d_v> / (|g_i| |d_v|), the gain of a step of fixed length (what the paper's experiments rank by).
    `gain`: cosine x sqrt(p_i (1 - p_i)), p_i the pass rate of the prompt's trajectories (`pass_rates_N`). Ours: the
    `dot` of gradients whose advantages are divided by their deviation, if the mean log-likelihood gradients of right
    and of wrong completions lay equally far apart for every prompt. What lengths say beyond that is taken for noise.
    A zero vector on either side gives 0; what is not a finite number stays so. `dot` reads no norms.
    """
    if score == "dot":
        return products_NV
    norms_NV = norms_N[:, None] * norms_V
    with np.errstate(invalid="ignore"):
        cosines_NV = np.divide(products_NV, norms_NV, out=np.zeros(products_NV.shape), where=norms_NV != 0)
    if score == "cosine":
        return cosines_NV
    if pass_rates_N is None:
        raise ValueError("gain needs the pass rates")
    return gain(cosines_NV, pass_rates_N)


def gain(cosines_NV: Float[np.ndarray, "N V"], pass_rates_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, "N V"]:
    """cosine x sqrt(p (1 - p)): see `influence`."""
    return cosines_NV * np.sqrt(learnability(pass_rates_N))[:, None]


def learnability(pass_rates_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """p (1 - p), the variance of a verdict (Foerster & Foster, arXiv 2502.12272). NaN stays NaN."""
    return pass_rates_N * (1 - pass_rates_N)
