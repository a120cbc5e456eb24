"""Influence: how far a training prompt's gradient points along a validation set's."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


def mean_direction(
    features_MD: Float[Tensor, "M D"], mean: Literal["plain", "normalized"] = "plain"
) -> Float[Tensor, " D"]:
    """Direction of one validation set, in float64.

    `plain`: (1/M) sum_m g_m, the gradient of the mean surrogate, so that <g_i, mean> = mean <g_i, g_m>.
    `normalized`: (1/M) sum_m g_m / |g_m|, in which no prompt weighs more than another; zero features stay zero.
    """
    features_MD = features_MD.double()
    if mean == "normalized":
        norms_M = features_MD.norm(dim=1, keepdim=True)
        features_MD = torch.where(norms_M > 0, features_MD / norms_M.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return features_MD.mean(dim=0)


def influence(
    feature_D: Float[Tensor, " D"], directions_VD: Float[Tensor, "V D"], score: Literal["dot", "cosine"] = "dot"
) -> Float[Tensor, " V"]:
    """Influence of one prompt on each validation set, in float64 (paper: Inf = <grad J(s0), grad J(s0')>).

    `dot`: <g, d_v>, the first-order gain of the validation objective from a step along g.
    `cosine`: <g, d_v> / (|g| |d_v|), the gain of a step of fixed length (what the paper's experiments rank by).
    A zero vector on either side gives 0.
    """
    feature_D = feature_D.double()
    products_V = directions_VD.double() @ feature_D
    if score == "dot":
        return products_V
    norms_V = directions_VD.double().norm(dim=1) * feature_D.norm()
    return torch.where(norms_V > 0, products_V / norms_V.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
