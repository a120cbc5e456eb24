"""Ranking of prompts, and fusion of several rankings into one. NumPy only: selection runs without torch."""

import math
from collections.abc import Sequence
from decimal import Decimal

import numpy as np
from jaxtyping import Float, Int


def selection_size(fraction: float, count: int) -> int:
    """ceil(fraction x count) of the fraction as it is written: 0.07 of 100 is 7, though 0.07 * 100 is above 7."""
    return math.ceil(Decimal(repr(fraction)) * count)


def ranks(scores_N: Float[np.ndarray, " N"], ids: Sequence[str] | None = None) -> Int[np.ndarray, " N"]:
    """Rank each row, 1 for the highest score; equal scores are ranked by id, in ascending order.

    Without `ids`, rows must already be in ascending order of their ids.
    """
    if np.isnan(scores_N).any():
        raise ValueError("a score is NaN and cannot be ranked")
    if ids is None:
        order = np.argsort(-scores_N, kind="stable")
    else:
        by_id = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
        order = by_id[np.argsort(-scores_N[by_id], kind="stable")]
    ranks_N = np.empty(len(scores_N), dtype=np.int64)
    ranks_N[order] = np.arange(1, len(scores_N) + 1)
    return ranks_N


def reciprocal_rank_fusion(
    ranks_NV: Int[np.ndarray, "N V"], *, kappa: float = 60.0, depth: int | None = None
) -> Float[np.ndarray, " N"]:
    """F_i = sum_v 1 / (kappa + rank_v(i)) (Cormack et al. 2009).

    With `depth`, only ranks up to it count; the others add 0. The paper's released code uses kappa = 0 and
    depth = floor(alpha N): there, first place in one list outweighs third place in two.
    """
    if kappa < 0:
        raise ValueError(f"kappa must be at least 0, got {kappa}")
    terms_NV = 1.0 / (kappa + ranks_NV)
    return np.where(ranks_NV <= depth, terms_NV, 0.0).sum(axis=1) if depth is not None else terms_NV.sum(axis=1)
