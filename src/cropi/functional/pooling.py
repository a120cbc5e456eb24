"""Influence and pass rates of a prompt, pooled over prompts that are alike. NumPy only.

Letters: N prompts to be judged, O observed ones (scored trajectories, validation prompts among them), V validation
sets, E numbers of a representation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

BANDWIDTHS = (2.0, 1.0, 1.25, 1.5, 2.5, 3.0)  # tried, the usual one first; in median distances to the nearest observed
TRUSTS = (1.0, 0.3, 0.1)  # weights tried for validation prompts beside the pool's
PRIOR = 1.0  # prompts that the pool as a whole counts for beside the neighbours
LEAST_SPREAD = 0.02  # of the pool's variance of own slopes: no neighbourhood is taken to be more uniform than that
OWN_ERROR = 0.25  # what a prompt's own squared error counts for beside its neighbours'
CELLS = 8192  # places that observed prompts are gathered in, where there are more of them
POINTS = 8192  # rows of representations widened at once
BLOCK = 2048  # rows of a kernel matrix made at once, at the most
NUMBERS = 1 << 21  # of a kernel matrix made at once, at the most: 16 MB


def principal_points(*parts: Float[np.ndarray, "_ E"], dimensions: int = 32) -> Float[np.ndarray, "N dimensions"]:
    """Coordinates of the rows of all parts along their first principal directions, scaled to a mean square length of 1.

    Fewer directions where there are fewer; all zeros where the rows are all alike. Rows are widened to float64 and
    centred a block at a time, since all of them may fill most of the memory.
    """
    rows = [part[start : start + POINTS] for part in parts for start in range(0, len(part), POINTS)]
    count = sum(map(len, rows))
    mean_E = sum(block.sum(axis=0, dtype=np.float64) for block in rows) / count
    covariance_EE = sum((centred := block - mean_E).T @ centred for block in rows) / count
    values_E, directions_EE = np.linalg.eigh(covariance_EE)
    kept = np.argsort(-values_E)[:dimensions]
    points = np.concatenate([(block - mean_E) @ directions_EE[:, kept] for block in rows])
    scale = float(np.sqrt((points**2).sum(axis=1).mean()))
    return points / scale if scale > 0 else points


def nearest_first(
    points_NE: Float[np.ndarray, "N E"], validation_ME: Float[np.ndarray, "M E"], sets: Sequence[str]
) -> Int[np.ndarray, " N"]:
    """Rows of the pool, the nearest to validation prompts first; of several sets, each takes its turn.

    By set the rows are ranked by min_m |x - x_m| over its prompts m; then all rows by their best rank, of equals the
    first. `sets` holds the set of each of the M validation prompts.
    """
    names = sorted(set(sets))
    members = [np.array([owner == name for owner in sets]) for name in names]
    nearest_VN = np.empty((len(names), len(points_NE)))
    for rows in blocks(len(points_NE), len(validation_ME)):
        squares_BM = _squares(points_NE[rows], validation_ME)
        nearest_VN[:, rows] = [squares_BM[:, member_M].min(axis=1) for member_M in members]
    ranks = [np.argsort(np.argsort(nearest_N, kind="stable"), kind="stable") for nearest_N in nearest_VN]
    order_N: np.ndarray = np.argsort(np.min(ranks, axis=0), kind="stable")
    return order_N


@dataclass(frozen=True)
class Observed:
    """Prompts whose influence has been estimated: some of the pool, and validation prompts as its guests."""

    places_OE: Float[np.ndarray, "O E"]
    strengths_O: Float[np.ndarray, " O"]
    """w = p (1 - p), >= 0. A group without signal has 0 and tells nothing."""
    influence_OV: Float[np.ndarray, "O V"]
    errors_OV: Float[np.ndarray, "O V"]
    """Standard errors; finite."""
    guests_O: Bool[np.ndarray, " O"]

    def trusting(self, trust: float) -> Observed:
        """With this weight on what guests tell: its root on strength, influence and error."""
        root_O = np.where(self.guests_O, np.sqrt(trust), 1.0)
        scaled = {name: root_O[:, None] * getattr(self, name) for name in ("influence_OV", "errors_OV")}
        return replace(self, strengths_O=root_O * self.strengths_O, **scaled)

    def every(self, step: int) -> Observed:
        """Every `step`th of them."""
        return Observed(*(getattr(self, field.name)[::step] for field in fields(self)))

    @cached_property
    def own_O(self) -> Bool[np.ndarray, " O"]:
        """The pool's own; all, where none of its own has any strength."""
        return ~self.guests_O if (self.strengths_O[~self.guests_O] > 0).any() else np.ones_like(self.guests_O)

    @cached_property
    def slope_V(self) -> Float[np.ndarray, " V"]:
        """g: the slope of the pool as a whole."""
        w = self.strengths_O[self.own_O]
        slope_V: np.ndarray = w @ self.influence_OV[self.own_O] / (w @ w)
        return slope_V

    @cached_property
    def spread_V(self) -> Float[np.ndarray, " V"]:
        """kappa_g: the variance of the pool's slopes around g."""
        w = self.strengths_O[self.own_O][:, None]
        excess_OV = (self.influence_OV[self.own_O] - w * self.slope_V) ** 2 - self.errors_OV[self.own_O] ** 2
        return np.maximum(excess_OV.sum(axis=0) / (w**2).sum(), 0.0)

    @cached_property
    def prior(self) -> float:
        """n_0: the square of `PRIOR` prompts' strength."""
        w2 = self.strengths_O[self.own_O] ** 2
        return PRIOR * float(w2[w2 > 0].mean())


def bandwidth_of(observed: Observed) -> float:
    """Twice the median distance of an observed prompt to the nearest other, unless one of `BANDWIDTHS` tells better.

    Better: by leaving one out (Stone 1974), sum_v mean_j (s_j - w_j f_-j)^2 / mean_j s_j^2 with f of `pooled_slopes`
    from all prompts but j is less by more than a standard error of the difference (Breiman et al. 1984, section
    3.4.3); then the best of those. Of more than `BLOCK` observed prompts every other one, or every third, ... is used.
    1 where all lie in one place.
    """
    observed = observed.every(-(-len(observed.guests_O) // BLOCK))
    squares_OO = _squares(observed.places_OE, observed.places_OE)
    apart_OO = np.where(squares_OO <= 1e-12 * max(float(squares_OO.max()), 1e-300), np.inf, squares_OO)
    nearest_O = np.sqrt(apart_OO.min(axis=1))
    if not np.isfinite(nearest_O).any():
        return 1.0
    unit = float(np.median(nearest_O[np.isfinite(nearest_O)]))
    losses_BO = np.stack([_left_out(squares_OO, observed, multiple * unit) for multiple in BANDWIDTHS])
    better_BO = losses_BO[0] - losses_BO
    gains_B, count = better_BO.mean(axis=1), better_BO.shape[1]
    gains_B[gains_B <= better_BO.std(axis=1, ddof=1) / np.sqrt(count)] = 0.0
    return unit * BANDWIDTHS[int(np.argmax(gains_B))]


def trust_of(observed: Observed) -> tuple[float, float]:
    """The weight, of `TRUSTS`, with which guests are to count beside the pool's own observed prompts, and the bandwidth
    that goes with it.

    The one by which neighbours tell the influence of the pool's own prompts best, each left out; of equals the largest.
    Guests mislead where the pool's prompts that look like them carry other labels. 1 where the pool has less than two
    observed prompts.
    """
    observed = observed.every(-(-len(observed.guests_O) // BLOCK))
    own_O = ~observed.guests_O
    if own_O.sum() < 2:
        return 1.0, bandwidth_of(observed)
    squares_OO = _squares(observed.places_OE, observed.places_OE)
    weighted = [(one := observed.trusting(trust), bandwidth_of(one)) for trust in TRUSTS]
    losses = [float(_left_out(squares_OO, *one)[own_O].mean()) for one in weighted]
    best = int(np.argmin(losses))
    return TRUSTS[best], weighted[best][1]


def _left_out(squares_OO: Float[np.ndarray, "O O"], observed: Observed, bandwidth: float) -> Float[np.ndarray, " O"]:
    """sum_v (s_j - w_j f_-j)^2 / the pool's mean s^2, of every observed prompt from all the others."""
    weights_OO = np.exp(-squares_OO / (2 * bandwidth**2))
    np.fill_diagonal(weights_OO, 0.0)
    w = observed.strengths_O
    f_OV = _smooth(weights_OO, w**2, w[:, None] * observed.influence_OV, observed)[0]
    power_V = np.maximum((observed.influence_OV[observed.own_O] ** 2).mean(axis=0), 1e-300)
    found_O: np.ndarray = ((observed.influence_OV - w[:, None] * f_OV) ** 2 / power_V).sum(axis=1)
    return found_O


def kernel(
    points_NE: Float[np.ndarray, "N E"], observed_OE: Float[np.ndarray, "O E"], bandwidth: float
) -> Float[np.ndarray, "N O"]:
    """k(x, x') = exp(-|x - x'|^2 / (2 h^2)): how much of a neighbour one prompt is to another, 1 for the same place."""
    return np.exp(-_squares(points_NE, observed_OE) / (2 * bandwidth**2))


def blocks(count: int, observed: int) -> list[slice]:
    """Rows of which a kernel matrix is made at once, in turn; one empty block of none.

    Fewer of longer rows: large arrays go back to the system when they are let go, and all their pages come anew.
    """
    rows = max(1, min(BLOCK, NUMBERS // max(observed, 1)))
    return [slice(start, start + rows) for start in range(0, max(count, 1), rows)]


@dataclass(frozen=True)
class Cells:
    """Places of the observed prompts, at most `CELLS`: each prompt's own, or the mean of those that are near.

    All that is pooled are sums over observed prompts of the kernel times something of theirs. A kernel that hardly
    differs within a cell can be taken out of the cell's sum, so the time for a prompt does not grow with the pool.
    """

    places_CE: Float[np.ndarray, "C E"]
    of_O: Int[np.ndarray, " O"] | None  # None: every prompt is a cell

    @classmethod
    def of(cls, places_OE: Float[np.ndarray, "O E"]) -> Cells:
        """Evenly spaced prompts found cells, and each prompt joins the nearest of them."""
        step = -(-len(places_OE) // CELLS)
        if step <= 1:
            return cls(places_OE, None)
        founders_CE = places_OE[::step]
        of_O = np.concatenate(
            [_squares(places_OE[rows], founders_CE).argmin(axis=1) for rows in blocks(len(places_OE), len(founders_CE))]
        )
        cells = cls(founders_CE, of_O)
        counts_C = cells.sums(np.ones(len(places_OE)))  # 0 where another cell lies in the same place
        means_CE = cells.sums(places_OE) / np.maximum(counts_C, 1)[:, None]
        return cls(means_CE[counts_C > 0], (np.cumsum(counts_C > 0) - 1)[of_O])

    def sums(self, values_OX: Float[np.ndarray, " O *X"]) -> Float[np.ndarray, " C *X"]:
        """By cell."""
        if self.of_O is None:
            return values_OX
        count = len(self.places_CE)
        if values_OX.ndim == 1:
            return np.bincount(self.of_O, values_OX, count)
        return np.stack([np.bincount(self.of_O, column, count) for column in values_OX.T], axis=1)


@dataclass(frozen=True)
class Slopes:
    """Influence per unit of strength of N prompts on V validation sets."""

    values_NV: Float[np.ndarray, "N V"]
    """Posterior mean."""
    errors_NV: Float[np.ndarray, "N V"]
    """Posterior standard deviation."""
    smooth_errors_NV: Float[np.ndarray, "N V"]
    """The part of it that the neighbourhood's f has: what is not known of prompts of this kind."""


def pooled_slopes(
    points_NE: Float[np.ndarray, "N E"], observed: Observed, own_N: Int[np.ndarray, " N"], bandwidth: float
) -> Slopes:
    """Posterior of each prompt's slope from its neighbours' influence and its own (local empirical Bayes).

    Model, by validation set: s_j = w_j (f(x_j) + u_j) + e_j, with w_j the strength p_j (1 - p_j), f a smooth function
    of where a prompt lies, u_j ~ N(0, kappa(x_j)) the prompt's own deviation, and e_j of the standard error given.
    With weights k_j = k(x, x_j) and n_0 = `PRIOR` prompts of the pool's mean square strength that have its slope g:

        f(x)     = (sum_j k_j w_j s_j + n_0 g) / (sum_j k_j w_j^2 + n_0),      g = sum_j w_j s_j / sum_j w_j^2
        kappa(x) = (sum_j k_j [(s_j - w_j f(x))^2 - e_j^2] + n_0 kappa_g) / (the same), at least a little
        u_j      = kappa w_j (s_j - w_j f) / (kappa w_j^2 + e_j^2)

    Guests say nothing of g, kappa_g and n_0, which are the pool's. Within u_j, e_j^2 is the prompt's own with the
    weight `OWN_ERROR` and else its neighbours' for such a strength: the error of a single prompt is itself little
    known. `own_N` is each prompt's row among the observed, -1 for one that has none: it gets f alone. Sources: kernel
    regression (Nadaraya 1964, Watson 1964), the normal means model of Efron & Morris (1973) with a variance that
    differs from place to place.

    ValueError where no observed prompt has any strength.
    """
    if not (observed.strengths_O > 0).any():
        raise ValueError("no observed prompt has any strength")
    cells = Cells.of(observed.places_OE)
    told = _Told.by(observed, cells)
    parts = [
        _posterior(kernel(points_NE[rows], cells.places_CE, bandwidth), told, observed, own_N[rows])
        for rows in blocks(len(points_NE), len(cells.places_CE))
    ]
    return Slopes(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Slopes)))


@dataclass(frozen=True)
class _Told:
    """Sums over the prompts of each cell: w^2, w^4, w s, s^2, e^2 and (w e)^2."""

    w2_C: Float[np.ndarray, " C"]
    w4_C: Float[np.ndarray, " C"]
    ws_CV: Float[np.ndarray, "C V"]
    s2_CV: Float[np.ndarray, "C V"]
    e2_CV: Float[np.ndarray, "C V"]
    w2e2_CV: Float[np.ndarray, "C V"]

    @classmethod
    def by(cls, observed: Observed, cells: Cells) -> _Told:
        w2, squared_OV = observed.strengths_O**2, observed.errors_OV**2
        weighted_OV = observed.strengths_O[:, None] * observed.influence_OV
        values = (w2, w2**2, weighted_OV, observed.influence_OV**2, squared_OV, w2[:, None] * squared_OV)
        return cls(*(cells.sums(value) for value in values))


def _smooth(
    weights_NC: Float[np.ndarray, "N C"],
    w2_C: Float[np.ndarray, " C"],
    ws_CV: Float[np.ndarray, "C V"],
    observed: Observed,
) -> tuple[Float[np.ndarray, "N V"], Float[np.ndarray, "N 1"]]:
    """f, and its denominator sum_j k_j w_j^2 + n_0."""
    mass_N1 = (weights_NC @ w2_C)[:, None] + observed.prior
    return (weights_NC @ ws_CV + observed.prior * observed.slope_V) / mass_N1, mass_N1


def _posterior(
    weights_NC: Float[np.ndarray, "N C"], told: _Told, observed: Observed, own_N: Int[np.ndarray, " N"]
) -> Slopes:
    w, prior = observed.strengths_O, observed.prior
    f_NV, mass_N1 = _smooth(weights_NC, told.w2_C, told.ws_CV, observed)
    # sum_j k_j (s_j - w_j f)^2, multiplied out
    residual_NV = (
        weights_NC @ told.s2_CV - 2 * f_NV * (weights_NC @ told.ws_CV) + f_NV**2 * (weights_NC @ told.w2_C)[:, None]
    )
    noise_NV = weights_NC @ told.e2_CV
    spread_NV = (residual_NV - noise_NV + prior * observed.spread_V) / mass_N1
    spread_NV = np.maximum(spread_NV, LEAST_SPREAD * observed.spread_V)
    per_strength_NV = noise_NV / np.maximum(mass_N1 - prior, 1e-300)
    squares_NC = weights_NC**2
    f_variance_NV = spread_NV * (squares_NC @ told.w4_C)[:, None] + squares_NC @ told.w2e2_CV
    f_variance_NV /= mass_N1**2
    f_variance_NV += (prior / mass_N1) ** 2 * observed.spread_V
    seen = (own_N >= 0) & (w[own_N] > 0)
    own, w_S1 = own_N[seen], w[own_N[seen]][:, None]
    noise_SV = OWN_ERROR * observed.errors_OV[own] ** 2 + (1 - OWN_ERROR) * per_strength_NV[seen] * w_S1**2
    signal_SV = spread_NV[seen] * w_S1**2
    gain_SV = np.divide(signal_SV, signal_SV + noise_SV, out=np.zeros_like(signal_SV), where=signal_SV > 0)
    values_NV, variance_NV = f_NV.copy(), spread_NV + f_variance_NV
    values_NV[seen] += gain_SV * (observed.influence_OV[own] / w_S1 - f_NV[seen])
    variance_NV[seen] = (1 - gain_SV) * spread_NV[seen] + (1 - gain_SV) ** 2 * f_variance_NV[seen]
    return Slopes(values_NV, np.sqrt(np.maximum(variance_NV, 0.0)), np.sqrt(f_variance_NV))


def pooled_strengths(
    points_NE: Float[np.ndarray, "N E"],
    tried_OE: Float[np.ndarray, "O E"],
    successes_O: Float[np.ndarray, " O"],
    counts_O: Float[np.ndarray, " O"],
    own_N: Int[np.ndarray, " N"],
    bandwidth: float,
    prior: float,
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Posterior mean pass rate and expected p (1 - p) of each prompt from its own tries and its neighbours'.

    Beta(a, b) with a = successes + prior m(x), b = failures + prior (1 - m(x)), where m(x) is the pass rate of the
    neighbours' tries, kernel-weighted, with the pool's own counted as `PRIOR` mean prompts:
    E[p (1 - p)] = a b / ((a + b) (a + b + 1)). `counts_O` may be discounted and need not be whole.
    """
    cells = Cells.of(tried_OE)
    successes_C, counts_C = cells.sums(successes_O), cells.sums(counts_O)
    near = [
        ((weights_BC := kernel(points_NE[rows], cells.places_CE, bandwidth)) @ successes_C, weights_BC @ counts_C)
        for rows in blocks(len(points_NE), len(cells.places_CE))
    ]
    successes_N, tries_N = (np.concatenate(column) for column in zip(*near, strict=True))
    pool, mean_count = successes_O.sum() / counts_O.sum(), counts_O.mean()
    rates_N = (successes_N + PRIOR * mean_count * pool) / (tries_N + PRIOR * mean_count)
    a_N, b_N = prior * rates_N, prior * (1 - rates_N)
    seen = own_N >= 0
    a_N[seen] += successes_O[own_N[seen]]
    b_N[seen] += (counts_O - successes_O)[own_N[seen]]
    total_N = a_N + b_N
    return a_N / total_N, a_N * b_N / (total_N * (total_N + 1))


def verdict_rates(means_N: Float[np.ndarray, " N"], variances_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Pass rates p of verdicts that vary as these rewards do: p (1 - p) = variance, on the mean's side of 1/2.

    The mean itself, to the bit, where the rewards are verdicts. NaN stays NaN.
    """
    roots_N = np.sqrt(np.maximum(1 - 4 * variances_N, 0.0))
    rates_N = np.where(means_N >= 0.5, (1 + roots_N) / 2, (1 - roots_N) / 2)
    return np.where((variances_N == means_N * (1 - means_N)) | np.isnan(means_N), means_N, rates_N)


def _squares(first_NE: Float[np.ndarray, "N E"], second_OE: Float[np.ndarray, "O E"]) -> Float[np.ndarray, "N O"]:
    cross_NO = first_NE @ second_OE.T
    lengths_N, lengths_O = (first_NE**2).sum(axis=1), (second_OE**2).sum(axis=1)
    return np.maximum(lengths_N[:, None] + lengths_O - 2 * cross_NO, 0.0)
