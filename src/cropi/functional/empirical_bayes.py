"""Empirical Bayes for noisy scores: reliability, shrinkage, and the probability of being among the best.

NumPy only. The model: true scores are draws from N(mu, tau^2), each observed with a normal error of its own size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cropi.functional.ranking import reciprocal_rank_fusion


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
