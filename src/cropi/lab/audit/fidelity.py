"""Agreement of off-policy with on-policy influence of the same prompts, and the ceiling that noise sets.

Two halves of one prompt's fresh trajectories estimate the same number, so their agreement is a ceiling for any estimate
from as many trajectories. The gap between ceiling and stored trajectories is bias; the gap between 1 and the ceiling is
noise. The validation direction is drawn three times: stored, fresh for the ceiling, and fresh for the reference of
both, so neither side gains from a shared direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from cropi.gradients.groups import SurrogateSettings, scales_of
from cropi.lab.audit.agreement import disattenuated, pearson, sign_agreement, spearman, top_overlap
from cropi.lab.audit.trajectory_products import TrajectoryProducts

REDRAWS = 200
SPLITS = 10
"""Random divisions of the trajectories that every agreement is a mean over."""


Interval = dict[str, float]  # a number (`value`) with the ends of its bootstrap interval over prompts (`low`, `high`)
Measure = Callable[[np.ndarray, np.ndarray], float]
Draw = Callable[[np.random.Generator], tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]]


@dataclass(frozen=True)
class _Side:
    """Trajectories of one kind, the same number for every prompt, and their products with one direction."""

    rewards_NK: Float[np.ndarray, "N K"]
    lengths_NK: Int[np.ndarray, "N K"]
    products_NK: Float[np.ndarray, "N K"]

    @property
    def count(self) -> int:
        return self.rewards_NK.shape[1]

    def scores(self, settings: SurrogateSettings, subset_Nk: Int[np.ndarray, "N k"]) -> Float[np.ndarray, " N"]:
        """Influence of each prompt from some of its trajectories."""
        taken = [
            np.take_along_axis(values_NK, subset_Nk, axis=1)
            for values_NK in (self.rewards_NK, self.lengths_NK, self.products_NK)
        ]
        return (scales_of(taken[0], taken[1], settings) * taken[2]).sum(axis=1)


def _side(products: Sequence[TrajectoryProducts], column: int) -> _Side:
    count = min(len(one.rewards_K) for one in products)
    return _Side(
        np.stack([one.rewards_K[:count] for one in products]),
        np.stack([one.lengths_K[:count] for one in products]),
        np.stack([one.products_KV[:count, column] for one in products]),
    )


class Comparison:
    """Scores of prompts on one validation set, recomputed from random subsets of their trajectories."""

    def __init__(
        self,
        stored: Sequence[TrajectoryProducts],
        fresh: Sequence[TrajectoryProducts],
        columns: tuple[int, int, int],
        settings: SurrogateSettings,
        share: float,
        seed: int,
    ) -> None:
        """`columns` are those of the products to score by: the directions of the stored validation trajectories, and of
        two draws of fresh ones, for the ceiling and for the reference. Where prompts differ in their number of
        trajectories, the smallest is used of each."""
        self._stored, self._ceiling, self._fresh = (
            _side(products, column) for products, column in zip((stored, fresh, fresh), columns, strict=True)
        )
        self._products, self._columns = (stored, fresh), columns
        self._settings, self._share, self._seed = settings, share, seed

    def by_count(self) -> list[dict[str, object]]:
        """For each K: agreement of K stored, and of K fresh trajectories, with the other fresh ones.

        Both sides of every comparison are independent draws. The reference is the same for stored and fresh: as many
        fresh trajectories as the largest K leaves.
        """
        counts = [k for k in (2, 4, 8, 16, 32, 64) if k <= min(self._stored.count, self._fresh.count // 2)]
        return [self._at(count, self._fresh.count - max(counts)) for count in counts]

    def _at(self, count: int, reference: int) -> dict[str, object]:
        stored, ceiling, fresh = self._stored, self._ceiling, self._fresh

        def off(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
            subset_NK = _shuffled(generator, stored)[:, :count]
            other_NK = _shuffled(generator, fresh)[:, :reference]
            return stored.scores(self._settings, subset_NK), fresh.scores(self._settings, other_NK)

        def on(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
            shuffled_NK = _shuffled(generator, fresh)
            parts = shuffled_NK[:, :count], shuffled_NK[:, count : count + reference]
            return ceiling.scores(self._settings, parts[0]), fresh.scores(self._settings, parts[1])

        return {
            "trajectories": count,
            "reference_trajectories": reference,
            "off_policy": self._agreements(off),
            "ceiling": self._agreements(on),
        }

    def _agreements(self, draw: Draw) -> dict[str, Interval]:
        """Means over splits, and their bootstrap intervals over prompts."""
        generator = np.random.default_rng(self._seed)
        draws = [draw(generator) for _ in range(SPLITS)]
        return {name: interval(draws, measure, self._seed) for name, measure in self._measures().items()}

    def _measures(self) -> dict[str, Measure]:
        return {
            "spearman": spearman,
            "top_overlap": lambda a, b: top_overlap(a, b, self._share),
            "sign_agreement": sign_agreement,
        }

    @cached_property
    def _whole(self) -> _Whole:
        """Stored scores, and fresh ones of the same expectation: a group's baseline takes (K - 1) / K of its gradient,
        so fresh trajectories are scored in groups of as many as are stored, and the scores averaged."""
        stored, size = self._stored, self._stored.count
        stored_N = stored.scores(self._settings, np.tile(np.arange(size), (len(stored.rewards_NK), 1)))
        groups = max(1, self._fresh.count // size)
        members = np.arange(groups * min(size, self._fresh.count)).reshape(groups, -1)
        fresh_GN, again_GN = (
            np.array([side.scores(self._settings, np.tile(part, (len(side.rewards_NK), 1))) for part in members])
            for side in (self._fresh, self._ceiling)
        )
        fresh_N = fresh_GN.mean(axis=0)
        noise_N = fresh_GN.var(axis=0, ddof=1) / groups if groups > 1 else self._jackknife(self._products[1], 2)
        return _Whole(
            stored_N,
            fresh_N,
            self._jackknife(self._products[0], 0),
            noise_N,
            (again_GN.mean(axis=0) - fresh_N) ** 2,
        )

    def _jackknife(self, products: Sequence[TrajectoryProducts], side: int) -> Float[np.ndarray, " N"]:
        """Squared error of each prompt's score. A jackknife's variance is that of K - 1 trajectories, so it is taken
        times (K - 1) / K; 0 where there are fewer than three."""
        column, squares = self._columns[side], []
        for one in products:
            error = float(one.errors(self._settings)[column])
            known = error if math.isfinite(error) else 0.0
            squares.append(known**2 * (len(one.rewards_K) - 1) / len(one.rewards_K))
        return np.array(squares)

    def overall(self) -> dict[str, object]:
        """From all trajectories: agreement, reliabilities, and the correlation corrected for noise."""
        whole = self._whole
        scores = whole.stored_N, whole.fresh_N
        raw = pearson(*scores)
        return {
            **{name: interval([scores], measure, self._seed) for name, measure in self._measures().items()},
            "pearson": raw,
            "pearson_without_noise": disattenuated(raw, *whole.reliabilities),
        }

    def error_parts(self) -> dict[str, Interval]:
        """Mean square of stored - fresh, taken apart: noise of either side's trajectories and of their validation
        directions, and what is left, bias. Each with its 95 % bootstrap interval over prompts.

        Relative to the variance of the true scores, estimated as the variance of the fresh ones less their noise.
        `slope` is the regression of stored on fresh scores over the fresh ones' reliability: 1 without bias, below 1
        where stored trajectories shrink influence. NaN where the fresh scores hold no more than noise.
        """
        generator, count = np.random.default_rng(self._seed), len(self._whole.stored_N)
        rows = [np.arange(count), *(generator.integers(count, size=count) for _ in range(REDRAWS))]
        found = [self._whole.parts(part) for part in rows]
        return {name: _percentiles(found[0][name], np.array([parts[name] for parts in found[1:]])) for name in found[0]}


@dataclass(frozen=True)
class _Whole:
    """Scores from all trajectories, and their squared errors."""

    stored_N: Float[np.ndarray, " N"]
    fresh_N: Float[np.ndarray, " N"]
    stored_noise_N: Float[np.ndarray, " N"]
    fresh_noise_N: Float[np.ndarray, " N"]
    direction_noise_N: Float[np.ndarray, " N"]
    """Squared difference between the same trajectories' scores by two draws of the validation direction."""

    @property
    def reliabilities(self) -> tuple[float, float]:
        """1 - noise / variance of either side, at least 0."""
        stored, fresh = (
            max(0.0, 1 - float(noise_N.mean()) / variance) if (variance := float(np.var(values_N, ddof=1))) > 0 else 0.0
            for values_N, noise_N in (
                (self.stored_N, self.stored_noise_N),
                (self.fresh_N, self.fresh_noise_N),
            )
        )
        return stored, fresh

    def parts(self, rows: Int[np.ndarray, " n"]) -> dict[str, float]:
        """Bias, variances and slope over some prompts."""
        stored_N, fresh_N = self.stored_N[rows], self.fresh_N[rows]
        stored, fresh, direction = (
            float(noise_N[rows].mean()) for noise_N in (self.stored_noise_N, self.fresh_noise_N, self.direction_noise_N)
        )
        signal = float(np.var(fresh_N, ddof=1)) - fresh
        if signal <= 0:
            return dict.fromkeys(("bias", "variance", "direction_variance", "slope"), math.nan)
        bias = float(((stored_N - fresh_N) ** 2).mean()) - stored - fresh - direction
        return {
            "bias": bias / signal,
            "variance": stored / signal,
            "direction_variance": direction / signal,
            "slope": float(np.cov(stored_N, fresh_N)[0, 1]) / signal,
        }


def _shuffled(generator: np.random.Generator, side: _Side) -> Int[np.ndarray, "N K"]:
    """A random order of each prompt's trajectories."""
    return generator.permuted(np.tile(np.arange(side.count), (len(side.rewards_NK), 1)), axis=1)


def gradient_cosines(
    pairs: Sequence[tuple[TrajectoryProducts, int]], settings: SurrogateSettings, seed: int
) -> dict[str, dict[str, float]] | None:
    """Median over prompts, and share above 0.6, of the cosine of a prompt's stored with its fresh gradient, from
    as many trajectories each; and between two fresh ones, its ceiling.

    Each pair is the products of stored and fresh trajectories together, with their inner products, and the number of
    stored ones, which come first.
    """
    generator = np.random.default_rng(seed)
    found: dict[str, list[float]] = {"off_policy": [], "ceiling": []}
    for products, stored in pairs:
        total = len(products.rewards_K)
        count = min(stored, (total - stored) // 2)
        order = stored + generator.permutation(total - stored)
        halves = order[:count], order[count : 2 * count]
        old = generator.permutation(stored)[:count]
        for name, first, second in (("off_policy", old, halves[0]), ("ceiling", halves[1], halves[0])):
            value = _cosine(products, first, second, settings)
            if math.isfinite(value):
                found[name].append(value)
    if not found["off_policy"] or not found["ceiling"]:
        return None
    return {name: _spread(values) for name, values in found.items()}


def _cosine(
    products: TrajectoryProducts, first_k: np.ndarray, second_k: np.ndarray, settings: SurrogateSettings
) -> float:
    """NaN where either side has no signal."""
    assert products.gram_KK is not None
    scales = [products.restricted(part).scales(settings)[0] for part in (first_k, second_k)]
    blocks = [
        products.gram_KK[np.ix_(a, b)] for a, b in ((first_k, second_k), (first_k, first_k), (second_k, second_k))
    ]
    product = float(scales[0] @ blocks[0] @ scales[1])
    squares = float(scales[0] @ blocks[1] @ scales[0]) * float(scales[1] @ blocks[2] @ scales[1])
    return product / math.sqrt(squares) if squares > 0 else math.nan


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "above_0.6": float((np.array(values) > 0.6).mean())}


def interval(
    draws: Sequence[tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]], measure: Measure, seed: int
) -> Interval:
    """Mean of a measure over draws, with the 95 % percentile bootstrap interval over prompts (Efron 1979)."""
    generator = np.random.default_rng(seed)
    count = len(draws[0][0])

    def mean(rows: np.ndarray) -> float:
        values = [measure(first_N[rows], second_N[rows]) for first_N, second_N in draws]
        return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan

    found = np.array([mean(generator.integers(count, size=count)) for _ in range(REDRAWS)])
    return _percentiles(mean(np.arange(count)), found)


def _percentiles(value: float, redrawn: Float[np.ndarray, " R"]) -> Interval:
    if not np.isfinite(redrawn).any():
        return {"value": value, "low": math.nan, "high": math.nan}
    low, high = np.nanquantile(redrawn, [0.025, 0.975]).tolist()
    return {"value": value, "low": low, "high": high}


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def plain(value: Mapping[str, object]) -> dict[str, object]:
    """Replace NaN, which JSON does not have, by None."""
    return {
        key: plain(inner) if isinstance(inner, Mapping) else _known(inner) if isinstance(inner, float) else inner
        for key, inner in value.items()
    }
