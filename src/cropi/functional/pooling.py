"""What neighbours say of a prompt: influence and pass rates pooled over prompts that are alike. NumPy only.

Letters: N prompts to be judged, O observed ones (scored trajectories, validation prompts among them), V validation
sets, E numbers of a representation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

BANDWIDTH = 3.0  # in median distances to the nearest observed prompt
PRIOR = 1.0  # prompts that the pool as a whole counts for beside the neighbours
LEAST_SPREAD = 0.02  # of the pool's variance of own slopes: no neighbourhood is taken to be more uniform than that
BLOCK = 2048  # rows of a kernel matrix made at once


def principal_points(
    representations_NE: Float[np.ndarray, "N E"], dimensions: int = 32
) -> Float[np.ndarray, "N dimensions"]:
    """Coordinates along the first principal directions, scaled to a mean square length of 1.

    Fewer directions where there are fewer; all zeros where the rows are all alike.
    """
    centred_NE = representations_NE - representations_NE.mean(axis=0)
    values_E, directions_EE = np.linalg.eigh(centred_NE.T @ centred_NE / len(centred_NE))
    kept = np.argsort(-values_E)[:dimensions]
    points = centred_NE @ directions_EE[:, kept]
    scale = float(np.sqrt((points**2).sum(axis=1).mean()))
    return points / scale if scale > 0 else points


def bandwidth_of(observed_OE: Float[np.ndarray, "O E"]) -> float:
    """`BANDWIDTH` times the median distance of an observed prompt to the nearest other one that differs from it."""
    squares_OO = _squares(observed_OE, observed_OE)
    squares_OO[squares_OO <= 1e-12 * max(float(squares_OO.max()), 1e-300)] = np.inf
    nearest_O = np.sqrt(squares_OO.min(axis=1))
    found_O = nearest_O[np.isfinite(nearest_O)]
    return BANDWIDTH * float(np.median(found_O)) if len(found_O) else 1.0


def kernel(
    points_NE: Float[np.ndarray, "N E"], observed_OE: Float[np.ndarray, "O E"], bandwidth: float
) -> Float[np.ndarray, "N O"]:
    """k(x, x') = exp(-|x - x'|^2 / (2 h^2)): how much of a neighbour one prompt is to another, 1 for the same place."""
    return np.exp(-_squares(points_NE, observed_OE) / (2 * bandwidth**2))


@dataclass(frozen=True)
class Slopes:
    """Influence per unit of strength of N prompts on V validation sets, and the posterior standard deviation."""

    values_NV: Float[np.ndarray, "N V"]
    errors_NV: Float[np.ndarray, "N V"]


def pooled_slopes(
    points_NE: Float[np.ndarray, "N E"],
    observed_OE: Float[np.ndarray, "O E"],
    strengths_O: Float[np.ndarray, " O"],
    influence_OV: Float[np.ndarray, "O V"],
    errors_OV: Float[np.ndarray, "O V"],
    own_N: Int[np.ndarray, " N"],
    bandwidth: float,
) -> Slopes:
    """Posterior of each prompt's slope from its neighbours' influence and its own (local empirical Bayes).

    Model, by validation set: s_j = w_j (f(x_j) + u_j) + e_j, with w_j the strength p_j (1 - p_j), f a smooth function
    of where a prompt lies, u_j ~ N(0, kappa(x_j)) the prompt's own deviation, and e_j of the standard error given.
    With weights k_j = k(x, x_j) and n_0 = `PRIOR` prompts of the mean square strength that have the pool's slope g:

        f(x)     = (sum_j k_j w_j s_j + n_0 g) / (sum_j k_j w_j^2 + n_0),      g = sum_j w_j s_j / sum_j w_j^2
        kappa(x) = (sum_j k_j [(s_j - w_j f(x))^2 - e_j^2] + n_0 kappa_g) / (the same), at least a little
        u_j      = kappa w_j (s_j - w_j f) / (kappa w_j^2 + e_j^2)

    Within u_j, e_j^2 is the mean of the prompt's own and its neighbours' for such a strength: a single jackknife error
    of K trajectories is itself noisy. `own_N` is each prompt's row among the observed, -1 for one that has none: it
    gets f alone. Sources: kernel regression (Nadaraya 1964, Watson 1964), the normal means model of Efron & Morris
    (1973) with a variance that differs from place to place.

    `errors_OV` must be finite. A group without signal has strength 0 and tells nothing. ValueError where none has any.
    """
    weight = strengths_O**2
    if not weight.sum() > 0:
        raise ValueError("no observed prompt has any strength")
    slope_V = strengths_O @ influence_OV / weight.sum()
    squared_OV = errors_OV**2
    excess_V = ((influence_OV - strengths_O[:, None] * slope_V) ** 2 - squared_OV).sum(axis=0) / weight.sum()
    pool = _Pool(slope_V, np.maximum(excess_V, 0.0), PRIOR * weight[weight > 0].mean())
    parts = [
        _posterior(
            kernel(points_NE[start : start + BLOCK], observed_OE, bandwidth),
            strengths_O,
            influence_OV,
            squared_OV,
            own_N[start : start + BLOCK],
            pool,
        )
        for start in range(0, len(points_NE), BLOCK)
    ]
    return Slopes(np.concatenate([p.values_NV for p in parts]), np.concatenate([p.errors_NV for p in parts]))


@dataclass(frozen=True)
class _Pool:
    slope_V: Float[np.ndarray, " V"]
    spread_V: Float[np.ndarray, " V"]  # variance of the slopes of its prompts
    weight: float  # n_0


def _posterior(
    weights_NO: Float[np.ndarray, "N O"],
    strengths_O: Float[np.ndarray, " O"],
    influence_OV: Float[np.ndarray, "O V"],
    squared_OV: Float[np.ndarray, "O V"],
    own_N: Int[np.ndarray, " N"],
    pool: _Pool,
) -> Slopes:
    w, w2 = strengths_O, strengths_O**2
    mass_N1 = (weights_NO @ w2)[:, None] + pool.weight
    f_NV = (weights_NO @ (w[:, None] * influence_OV) + pool.weight * pool.slope_V) / mass_N1
    # sum_j k_j (s_j - w_j f)^2, multiplied out
    residual_NV = (
        weights_NO @ influence_OV**2
        - 2 * f_NV * (weights_NO @ (w[:, None] * influence_OV))
        + f_NV**2 * (weights_NO @ w2)[:, None]
    )
    noise_NV = weights_NO @ squared_OV
    spread_NV = (residual_NV - noise_NV + pool.weight * pool.spread_V) / mass_N1
    spread_NV = np.maximum(spread_NV, LEAST_SPREAD * pool.spread_V)
    per_strength_NV = noise_NV / np.maximum(mass_N1 - pool.weight, 1e-300)
    local_NV = spread_NV + per_strength_NV  # variance of s / w around f, for a strength of 1
    f_variance_NV = local_NV * (weights_NO**2 @ w2)[:, None] / mass_N1**2
    f_variance_NV += (pool.weight / mass_N1) ** 2 * pool.spread_V
    seen = (own_N >= 0) & (w[own_N] > 0)
    own, w_S1 = own_N[seen], w[own_N[seen]][:, None]
    noise_SV = 0.5 * squared_OV[own] + 0.5 * per_strength_NV[seen] * w_S1**2
    signal_SV = spread_NV[seen] * w_S1**2
    gain_SV = np.divide(signal_SV, signal_SV + noise_SV, out=np.zeros_like(signal_SV), where=signal_SV > 0)
    values_NV, variance_NV = f_NV.copy(), spread_NV + f_variance_NV
    values_NV[seen] += gain_SV * (influence_OV[own] / w_S1 - f_NV[seen])
    variance_NV[seen] = (1 - gain_SV) * spread_NV[seen] + (1 - gain_SV) ** 2 * f_variance_NV[seen]
    return Slopes(values_NV, np.sqrt(np.maximum(variance_NV, 0.0)))


def pooled_strengths(
    weights_NO: Float[np.ndarray, "N O"],
    successes_O: Float[np.ndarray, " O"],
    counts_O: Float[np.ndarray, " O"],
    own_N: Int[np.ndarray, " N"],
    prior: float,
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Posterior mean pass rate and expected p (1 - p) of each prompt from its own tries and its neighbours'.

    Beta(a, b) with a = successes + prior m(x), b = failures + prior (1 - m(x)), where m(x) is the pass rate of the
    neighbours' tries, kernel-weighted, with the pool's own counted as `PRIOR` mean prompts:
    E[p (1 - p)] = a b / ((a + b) (a + b + 1)). `counts_O` may be discounted and need not be whole.
    """
    pool, mean_count = successes_O.sum() / counts_O.sum(), counts_O.mean()
    tries_N = weights_NO @ counts_O + PRIOR * mean_count
    rates_N = (weights_NO @ successes_O + PRIOR * mean_count * pool) / tries_N
    a_N, b_N = prior * rates_N, prior * (1 - rates_N)
    seen = own_N >= 0
    a_N[seen] += successes_O[own_N[seen]]
    b_N[seen] += (counts_O - successes_O)[own_N[seen]]
    total_N = a_N + b_N
    return a_N / total_N, a_N * b_N / (total_N * (total_N + 1))


def _squares(first_NE: Float[np.ndarray, "N E"], second_OE: Float[np.ndarray, "O E"]) -> Float[np.ndarray, "N O"]:
    cross_NO = first_NE @ second_OE.T
    lengths_N, lengths_O = (first_NE**2).sum(axis=1), (second_OE**2).sum(axis=1)
    return np.maximum(lengths_N[:, None] + lengths_O - 2 * cross_NO, 0.0)
