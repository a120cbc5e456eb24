"""Ranking of prompts: fusion of several rankings, and empirical Bayes for noisy scores. NumPy only: free of torch.

The model of noise: true scores are draws from N(mu, tau^2), each observed with a normal error of its own size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    terms_NV = 1.0 / (kappa + ranks_NV)
    return np.where(ranks_NV <= depth, terms_NV, 0.0).sum(axis=1) if depth is not None else terms_NV.sum(axis=1)


def reliability(estimates_N: Float[np.ndarray, " N"], errors_N: Float[np.ndarray, " N"]) -> float:
    """1 - mean(s^2) / variance, at least 0: the share of the estimates' variance that is not noise.

    It estimates the correlation of two estimates from independent trajectories, on the same validation direction. 0
    if the estimates are constant; NaN errors are ignored.
    """
    variance = float(np.var(estimates_N, ddof=1)) if len(estimates_N) > 1 else 0.0
    noise = _mean_square(errors_N)
    return max(0.0, 1 - noise / variance) if variance > 0 else 0.0


@dataclass(frozen=True)
class Posterior:
    """Posterior mean and standard deviation of every true score."""

    means_N: Float[np.ndarray, " N"]
    deviations_N: Float[np.ndarray, " N"]


def shrunk(estimates_N: Float[np.ndarray, " N"], errors_N: Float[np.ndarray, " N"]) -> Posterior:
    """Empirical Bayes (Morris 1983): with tau^2 = variance - mean(s^2), at least 0, and mu the mean of the estimates,
    mean_i = mu + B_i (x_i - mu), variance_i = B_i s_i^2, B_i = tau^2 / (tau^2 + s_i^2).

    NaN errors are replaced by the root mean square of the others.
    """
    noise = _mean_square(errors_N)
    squares_N = np.where(np.isnan(errors_N), noise, errors_N**2)
    spread = max(0.0, float(np.var(estimates_N, ddof=1)) - noise) if len(estimates_N) > 1 else 0.0
    total_N = spread + squares_N
    factors_N = np.divide(spread, total_N, out=np.ones(len(estimates_N)), where=total_N > 0)
    mean = float(estimates_N.mean()) if len(estimates_N) else 0.0
    return Posterior(mean + factors_N * (estimates_N - mean), np.sqrt(factors_N * squares_N))


def _mean_square(errors_N: Float[np.ndarray, " N"]) -> float:
    known_N = errors_N[~np.isnan(errors_N)]
    return float((known_N**2).mean()) if len(known_N) else 0.0


def top_probabilities(
    posteriors: list[Posterior],
    size: int,
    *,
    kappa: float = 60.0,
    depth: int | None = None,
    draws: int = 200,
    seed: int = 0,
) -> Float[np.ndarray, " N"]:
    """Share of `draws` from the posteriors in which each prompt is among the `size` best of the fused ranking.

    One posterior per validation set, drawn independently. This ignores that errors of one prompt on several sets share
    its trajectories. Fusion as in `reciprocal_rank_fusion`.
    """
    count = len(posteriors[0].means_N)
    if count <= size:
        return np.ones(count)
    generator = np.random.default_rng(seed)
    hits_N = np.zeros(count)
    for _ in range(draws):
        ranks_NV = np.empty((count, len(posteriors)), dtype=np.int64)
        for v, posterior in enumerate(posteriors):
            drawn_N = posterior.means_N + posterior.deviations_N * generator.standard_normal(count)
            ranks_NV[np.argsort(-drawn_N, kind="stable"), v] = np.arange(1, count + 1)
        fused_N = reciprocal_rank_fusion(ranks_NV, kappa=kappa, depth=depth)
        hits_N[np.argsort(-fused_N, kind="stable")[:size]] += 1
    return hits_N / draws


def spearman_brown(correlation: float) -> float:
    """Reliability of a measurement twice as long: 2 r / (1 + r) (Spearman, Brown 1910)."""
    return 2 * correlation / (1 + correlation)
