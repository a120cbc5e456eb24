"""Belief about prompts while a policy trains: their influence on a validation set.

Letters: P points, which are the N prompts of the pool and then the validation prompts; F features of a point.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from cropi.functional.points import BLOCK, nearest_cosines, squared_distances, unit_rows

HALF_LIFE = 16.0  # steps after which what was seen of influence counts half: the policy has moved
SPREADS = (0.25, 1.0, 4.0)  # tried: prior variance of the common part, relative to the observed slopes
OWN_SHARES = (0.1, 0.5, 2.0)  # tried: variance of a prompt's own part, relative to the common part
CORRELATIONS = (1.0, 0.9, 0.6, 0.3)  # tried: between what a validation prompt and a pool prompt like it give
BANDWIDTH = 4.0  # median distances to the nearest other point
FORGOTTEN = 10  # half-lives after which an observation is dropped
LIKENESS = 0.125  # slope of a prompt one deviation more alike than the pool, in those observed: mean and deviation
MOST_ALIKE = 3.0  # deviations


@dataclass(frozen=True)
class Hyperparameters:
    """Prior variances and the correlation of tasks, by marginal likelihood."""

    spread: float  # s: weights w ~ N(0, s I)
    own_share: float  # own effects u ~ N(0, own_share s)
    correlation: float  # rho


@dataclass(frozen=True)
class Posterior:
    """Of the slopes f_i = x_i . w + u_i of the pool's prompts: influence per unit of learnability.

    The direction's error is the same for all prompts, so that no number of observations makes it smaller. Two halves
    of the direction show it: m' is what is believed of half their difference. `reliability` is the share of the
    evidence that is not such error, r = 1 - |m'|^2 / |m - m_0|^2 over the pool, with m the mean and m_0 the prior mean.
    """

    features_NF: Float[np.ndarray, "N F"]
    prior_F: Float[np.ndarray, " F"]  # mean of w before
    mean_F: Float[np.ndarray, " F"]  # and after
    difference_F: Float[np.ndarray, " F"]  # of half the difference between the halves of the direction
    root_FF: Float[np.ndarray, "F F"]  # R with R R^T the covariance of w
    trust_N: Float[np.ndarray, " N"]  # of a prompt's own observations: tau / (tau + 1 / precision); 0 if unseen
    seen_N2: Float[np.ndarray, "N 2"]  # their mean, and that of the half differences; 0 if unseen
    own_N: Float[np.ndarray, " N"]  # tau, prior variances of the own effects
    chosen: Hyperparameters
    log_likelihood: float

    def means(self) -> Float[np.ndarray, " N"]:
        """Expected slopes: m_0 + r (m - m_0)."""
        prior_N, evidence_N = self._prior_and_evidence
        found: np.ndarray = prior_N + self.reliability * evidence_N
        return found

    @cached_property
    def reliability(self) -> float:
        """Share of the evidence that is not the direction's error; 0 without evidence."""
        _, evidence_N = self._prior_and_evidence
        squares = float(evidence_N @ evidence_N)
        return max(0.0, 1 - float(self._differences_N @ self._differences_N) / squares) if squares > 0 else 0.0

    def variances(self) -> Float[np.ndarray, " N"]:
        """Variances of the slopes."""
        blocks = (self.features_NF[start : start + BLOCK] for start in range(0, len(self.features_NF), BLOCK))
        common_N = np.concatenate([((block @ self.root_FF) ** 2).sum(axis=1) for block in blocks])
        own_N = (1 - self.trust_N) ** 2 * common_N + (1 - self.trust_N) * self.own_N
        found: np.ndarray = own_N + self._differences_N**2
        return found

    def draw(self, generator: np.random.Generator) -> Float[np.ndarray, " N"]:
        """One joint draw of all slopes. The direction's error has one sign and size for all."""
        common_N = self._common(self.root_FF @ generator.standard_normal(len(self.mean_F)))
        own_N = generator.standard_normal(len(self.trust_N)) * np.sqrt((1 - self.trust_N) * self.own_N)
        found: np.ndarray = self.means() + (1 - self.trust_N) * common_N + own_N
        return found + generator.standard_normal() * self._differences_N

    @cached_property
    def _prior_and_evidence(self) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
        prior_N = self._common(self.prior_F)
        return prior_N, self._given(self._common(self.mean_F), self.seen_N2[:, 0]) - prior_N

    @cached_property
    def _differences_N(self) -> Float[np.ndarray, " N"]:
        return self._given(self._common(self.difference_F), self.seen_N2[:, 1])

    def _common(self, weights_F: Float[np.ndarray, " F"]) -> Float[np.ndarray, " N"]:
        found: np.ndarray = self.features_NF @ weights_F.astype(self.features_NF.dtype)
        return found.astype(np.float64)

    def _given(self, common_N: Float[np.ndarray, " N"], seen_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        return (1 - self.trust_N) * common_N + self.trust_N * seen_N


class InfluenceBelief:
    """Belief about the influence of every prompt on one validation set, per unit of learnability.

    Slopes are linear in features, with an effect of the prompt's own: f_i = x_i . w + u_i. The last feature is the
    prompt's likeness to the set. Its weight is expected to be positive; all others have a mean of 0. A validation
    prompt's slope is that of a second task with correlation rho: x_j . (rho w + sqrt(1 - rho^2) w') + u_j. The own
    effect's variance is s (own share + 1 - |x_i|^2), so that a prompt far from all landmarks is as uncertain as under
    the kernel itself (FITC; Snelson and Ghahramani 2006). An observation is y = f + error. All errors have one
    variance, doubled every `HALF_LIFE` steps: a single one's own estimate is large where its slope is, so that weights
    by it would make the large slopes count for little.
    """

    def __init__(
        self,
        pool_NF: Float[np.ndarray, "N F"],
        validation_MF: Float[np.ndarray, "M F"],
        likeness_P: Float[np.ndarray, " P"],
    ) -> None:
        """Points are numbered from the pool's first to the last validation prompt."""
        self._pool = len(pool_NF)
        squares = (np.einsum("pf,pf->p", each, each) for each in (pool_NF, validation_MF))
        self._beyond_P = np.maximum(1 - np.concatenate([*squares]), 0.0)
        likeness_P1 = likeness_P[:, None].astype(pool_NF.dtype)
        self._pool_NF = np.concatenate([pool_NF, likeness_P1[: self._pool]], axis=1)
        self._validation_MF = np.concatenate([validation_MF, likeness_P1[self._pool :]], axis=1)
        self._seen_O5 = np.empty((0, 5))  # point, slope, half difference, squared error, step
        self._step = 0

    def observe(self, point: int, slope: float, squared_error: float, step: int, half_difference: float = 0.0) -> bool:
        """Add an observation of a point's slope, with half the difference between the direction's two halves.

        Returns False for one that is not finite, which is left out.
        """
        seen = [point, slope, half_difference, squared_error, step]
        if not np.isfinite(seen).all():
            return False
        self._seen_O5 = np.concatenate([self._seen_O5, [seen]])
        self.age_to(step)
        return True

    def age_to(self, step: int) -> None:
        """Let time pass. Observations that count less than a thousandth are forgotten."""
        if step > self._step:
            self._step = step
            self._seen_O5 = self._seen_O5[step - self._seen_O5[:, 4] < FORGOTTEN * HALF_LIFE]

    def summary(self) -> tuple[Int[np.ndarray, " S"], Float[np.ndarray, "S 2"], Float[np.ndarray, " S"]]:
        """The points that were seen, the means of each one's slopes and half differences, and the slopes' variance."""
        points_O, errors_O = self._seen_O5[:, 0].astype(int), self._seen_O5[:, 3]
        weights_O = 2.0 ** (-np.maximum(self._step - self._seen_O5[:, 4], 0) / HALF_LIFE)
        mean_error = float(weights_O @ errors_O / weights_O.sum()) if len(points_O) else 0.0
        if mean_error <= 0:  # nothing is known of the errors
            return np.empty(0, dtype=int), np.empty((0, 2)), np.empty(0)
        seen, place_O = np.unique(points_O, return_inverse=True)
        weights_S = np.bincount(place_O, weights_O)
        sums = [np.bincount(place_O, weights_O * values_O) for values_O in self._seen_O5[:, 1:3].T]
        return seen, np.stack(sums, axis=1) / weights_S[:, None], mean_error / weights_S

    def posterior(self, chosen: Hyperparameters | None = None) -> Posterior | None:
        """Belief at these hyper-parameters, by default those of the largest marginal likelihood on a grid.

        None before any observation.
        """
        seen, seen_S2, noise_S = self.summary()
        if not len(seen):
            return None
        means_S = seen_S2[:, 0]
        validation_S = seen >= self._pool
        features_SF = np.concatenate(
            [self._pool_NF[seen[~validation_S]], self._validation_MF[seen[validation_S] - self._pool]]
        )
        data = features_SF.astype(np.float64), self._beyond_P[seen], validation_S, means_S
        best = _most_likely(data, noise_S) if chosen is None else _Solved(*data, noise_S, chosen)
        return self._of_pool(best, seen, seen_S2, noise_S)

    def _of_pool(
        self,
        best: _Solved,
        seen: Int[np.ndarray, " S"],
        seen_S2: Float[np.ndarray, "S 2"],
        noise_S: Float[np.ndarray, " S"],
    ) -> Posterior:
        own_N = best.chosen.spread * (best.chosen.own_share + self._beyond_P[: self._pool])
        trust_N, seen_N2 = np.zeros(self._pool), np.zeros((self._pool, 2))
        mine = seen[seen < self._pool]
        trust_N[mine] = own_N[mine] / (own_N[mine] + noise_S[: len(mine)])
        seen_N2[mine] = seen_S2[: len(mine)]
        width = self._pool_NF.shape[1]
        covariance = best.covariance()[:width, :width]
        root = np.linalg.cholesky(covariance + 1e-12 * np.trace(covariance) / width * np.eye(width))
        return Posterior(
            features_NF=self._pool_NF,
            prior_F=best.prior_D[:width],
            mean_F=best.mean()[:width],
            difference_F=best.weights_of(seen_S2[:, 1])[:width],
            root_FF=root,
            trust_N=trust_N,
            seen_N2=seen_N2,
            own_N=own_N,
            chosen=best.chosen,
            log_likelihood=best.log_likelihood,
        )

    def state(self) -> dict[str, np.ndarray]:
        """Arrays from which `restore` continues bit for bit."""
        return {"seen": self._seen_O5.copy(), "step": np.array([self._step])}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over such a state."""
        self._seen_O5, self._step = state["seen"].copy(), int(state["step"][0])


def _scale(means_S: Float[np.ndarray, " S"], noise_S: Float[np.ndarray, " S"]) -> float:
    """Mean square of the slopes, without that of their errors."""
    excess = float((means_S**2 - noise_S).mean())
    return max(excess, 0.1 * float((means_S**2).mean()), 1e-100)


class _Solved:
    """The posterior of (w, w') at some hyper-parameters, from S points that were seen.

    y_i ~ N(z_i . (w, w'), tau_i + noise_i) with z = (x, 0) for the pool and (rho x, sqrt(1 - rho^2) x) for validation.
    """

    def __init__(
        self,
        features_SF: Float[np.ndarray, "S F"],
        beyond_S: Float[np.ndarray, " S"],
        validation_S: Bool[np.ndarray, " S"],
        means_S: Float[np.ndarray, " S"],
        noise_S: Float[np.ndarray, " S"],
        chosen: Hyperparameters,
    ) -> None:
        self.chosen, scale = chosen, _scale(means_S, noise_S)
        rho, two_tasks = chosen.correlation, chosen.correlation < 1
        first_SF = features_SF * np.where(validation_S, rho, 1.0)[:, None]
        parts = [first_SF]
        if two_tasks:
            parts.append(features_SF * np.where(validation_S, np.sqrt(1 - rho**2), 0.0)[:, None])
        z_SD = np.concatenate(parts, axis=1)
        weight_S = 1 / (chosen.spread * (chosen.own_share + beyond_S) + noise_S)
        variance_D, self.prior_D = np.full(z_SD.shape[1], chosen.spread), np.zeros(z_SD.shape[1])
        likeness = features_SF.shape[1] - 1
        variance_D[likeness :: likeness + 1] = LIKENESS**2 * scale
        self.prior_D[likeness] = LIKENESS * scale**0.5
        rest_S = means_S - z_SD @ self.prior_D
        precision = np.diag(1 / variance_D) + z_SD.T @ (weight_S[:, None] * z_SD)
        self._root = np.linalg.cholesky(precision)
        self._gain_DS = z_SD.T * weight_S
        self._shift_D = self.weights_of(rest_S)
        log_determinant = 2 * np.log(np.diag(self._root)).sum() + np.log(variance_D).sum()
        quadratic = float((weight_S * rest_S**2).sum() - self._shift_D @ (self._gain_DS @ rest_S))
        self.log_likelihood = -0.5 * float(
            log_determinant - np.log(weight_S).sum() + quadratic + len(means_S) * np.log(2 * np.pi)
        )

    def weights_of(self, values_S: Float[np.ndarray, " S"]) -> Float[np.ndarray, " D"]:
        """Expected weights, from a prior mean of 0, if these values were seen."""
        half_D = np.linalg.solve(self._root, self._gain_DS @ values_S)
        found: np.ndarray = np.linalg.solve(self._root.T, half_D)
        return found

    def mean(self) -> Float[np.ndarray, " D"]:
        found: np.ndarray = self.prior_D + self._shift_D
        return found

    def covariance(self) -> Float[np.ndarray, "D D"]:
        inverse = np.linalg.inv(self._root)
        found: np.ndarray = inverse.T @ inverse
        return found


def _most_likely(data: tuple[Any, Any, Any, Any], noise_S: Float[np.ndarray, " S"]) -> _Solved:
    """The posterior of the largest marginal likelihood on a grid."""
    scale, correlations = _scale(data[3], noise_S), CORRELATIONS if data[2].any() else (1.0,)
    grid = (Hyperparameters(s * scale, own, rho) for s, own, rho in product(SPREADS, OWN_SHARES, correlations))
    return max((_Solved(*data, noise_S, each) for each in grid), key=lambda each: each.log_likelihood)


def kernel_features(
    points_PE: Float[np.ndarray, "P E"], pool: int, dimensions: int = 128, *, seed: int = 0
) -> Float[np.ndarray, "P F"]:
    """Features whose inner products approximate exp(-|x - y|^2 / 2 h^2) (Nystroem; Williams and Seeger 2001).

    h is `BANDWIDTH` times the median distance of a point to its nearest other, over up to 2,000 of them. Landmarks are
    all points, if there are no more than `dimensions`; else a random sample of the pool and of the validation prompts,
    half each where there are as many.
    """
    generator = np.random.default_rng(seed)
    sample = points_PE[np.sort(generator.permutation(len(points_PE))[:2000])].astype(np.float64)
    squares = squared_distances(sample, sample) + np.diag(np.full(len(sample), np.inf))
    nearest = np.sqrt(squares.min(axis=1)) if len(sample) > 1 else np.ones(1)
    positive = nearest[nearest > 0]
    width = 2 * (BANDWIDTH * float(np.median(positive))) ** 2 if len(positive) else 1.0
    landmarks = points_PE[_landmarks(len(points_PE), pool, dimensions, generator)].astype(np.float64)
    values, vectors = np.linalg.eigh(np.exp(-squared_distances(landmarks, landmarks) / width))
    kept = values > 1e-8 * values.max()
    root = vectors[:, kept] / np.sqrt(values[kept])
    found = np.empty((len(points_PE), root.shape[1]), dtype=np.float32)
    for start in range(0, len(points_PE), BLOCK):
        part = slice(start, start + BLOCK)
        found[part] = np.exp(-squared_distances(points_PE[part].astype(np.float64), landmarks) / width) @ root
    return found


def likeness(points_NE: Float[np.ndarray, "N E"], validation_ME: Float[np.ndarray, "M E"]) -> Float[np.ndarray, " P"]:
    """Likeness of each point to a validation set beyond the pool's average.

    l_i = z_i^3 with z_i = max(0, c_i - mean c) / sd c, at most 3, and c_i the cosine with the nearest validation
    prompt: for the pool's prompts, and then for the validation prompts, of which each has the nearest other one. Cubed,
    since prompts of another kind teach far less than those of the same.
    """
    unit_ME, cosines_N = unit_rows(validation_ME), nearest_cosines(points_NE, validation_ME)
    own_MM = unit_ME @ unit_ME.T - 2 * np.eye(len(unit_ME))
    deviation = float(cosines_N.std())
    centred_P = np.concatenate([cosines_N, own_MM.max(axis=1)]) - cosines_N.mean()
    return np.clip(centred_P / deviation, 0.0, MOST_ALIKE) ** 3 if deviation > 0 else np.zeros(len(centred_P))


def _landmarks(points: int, pool: int, dimensions: int, generator: np.random.Generator) -> Int[np.ndarray, " L"]:
    if points <= dimensions:
        return np.arange(points)
    held_out = min(points - pool, dimensions // 2)
    of_pool = generator.permutation(pool)[: dimensions - held_out]
    return np.sort(np.concatenate([of_pool, pool + generator.permutation(points - pool)[:held_out]]))
