"""BMC: Thompson sampling down a tree of similar prompts, by how far the rewards of a group spread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from cropi.curriculum.chooser import Choice, ChoosesBatches, Pool, RewardChooser
from cropi.curriculum.strategy import Need, StrategyTable
from cropi.functional.points import squared_distances

LEAST_COUNT, MOST_COUNT = 0.2, 10.0  # limits of lambda
LEAST_VARIANCE = 0.05
SMOOTHING = 0.05  # rho: share of the targets' weight that is divided evenly
FEW = 0.01  # share of the siblings' prompts at which a cluster's utility is halved


class BmcStrategy(ChoosesBatches, StrategyTable):
    """Prompts whose rewards spread, found by Thompson sampling down a tree of similar prompts (BMC)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"rewards", "representations"})
    represented_depth: ClassVar[float] = 0.75

    type: Literal["bmc"]
    utility: Annotated[float, Field(ge=0)] = 0.0
    """gamma: weight of being in a cluster with many validation prompts. BMC has 0, BMC-T 0.25 (released script)."""
    visit_all_first: bool = True
    """Draw every prompt once at random before the tree is used, as published; then small pools train on little else."""

    def chooser(self, pool: Pool) -> Bmc:
        """The chooser, with its tree: of the pool, and for BMC-T of the validation prompts too."""
        sets = pool.validation_states if self.utility else {}
        tree = prompt_tree(np.concatenate([pool.states_NE, *sets.values()]))
        return Bmc(pool, tree, {name: len(own) for name, own in sets.items()}, self.utility, self.visit_all_first)


@dataclass
class _Node:
    """A cluster with what is believed of its prompts, from those below it."""

    children: list[_Node]
    places: Int[np.ndarray, " n"]  # prompts of the pool below it
    utility: float = 0.0
    mean: float = 0.0
    variance: float = 0.0
    spread: float = 0.0  # tau: variance between children beyond their own


class Bmc(RewardChooser):
    """Normal beliefs N(mu, sigma^2) with a count lambda about r = logit(mean |R - mean R|), rewards R in {-1, 1}
    (arXiv 2606.19750).

    A place of the batch goes down the tree to the child with the largest draw, and in a leaf to the prompt with the
    largest. Surprising and long unseen prompts become uncertain again.
    """

    def __init__(
        self, pool: Pool, tree: Cluster, targets: Mapping[str, int], utility: float, visit_all_first: bool
    ) -> None:
        """`targets`: members of every validation set, whose points follow the pool's in the tree."""
        super().__init__(pool)
        self._gamma, self._visit_all_first = utility, visit_all_first
        self._least = 1 / pool.generations**2
        self._range = float(np.log(1 / self._least - 1))
        weights = np.concatenate([np.zeros(len(pool)), *(np.full(size, 1 / size) for size in targets.values())])
        self.tree = _node(tree, len(pool), weights)
        self.mean_N = np.zeros(len(pool))
        self.count_N = np.ones(len(pool))
        self.variance_N = np.full(len(pool), (self._range / 3.5) ** 2)
        self.seen_at_N = np.full(len(pool), -1)

    # Choosing

    def choose(self, count: int, step: int, generator: np.random.Generator) -> list[Choice]:
        free_N, chosen = np.ones(len(self.pool), dtype=bool), list[Choice]()
        if self._visit_all_first:
            unseen = generator.permutation(np.flatnonzero(self.times_N == 0))[:count]
            chosen = [Choice(int(place), "uniform", "") for place in unseen]
            free_N[unseen] = False
        if len(chosen) < count:
            self.aggregate(self.tree)
        while len(chosen) < count:
            place = self._descend(free_N, generator)
            chosen.append(Choice(place, "draw", ""))
            free_N[place] = False
        return chosen

    def aggregate(self, node: _Node) -> None:
        """Believe of a cluster what its children say, by their precision."""
        for child in node.children:
            self.aggregate(child)
        if node.children:
            means = np.array([child.mean for child in node.children])
            variances = np.array([child.variance for child in node.children])
        else:
            means, variances = self.mean_N[node.places], self.variance_N[node.places]
        node.spread = max(0.0, float(means.var() - variances.mean()))
        weights = 1 / (variances + node.spread + 1e-8)
        node.mean, node.variance = float((weights @ means) / weights.sum()), float(1 / weights.sum())

    def _descend(self, free_N: np.ndarray, generator: np.random.Generator) -> int:
        node = self.tree
        while node.children:
            left = [child for child in node.children if free_N[child.places].any()]
            means = np.array([child.mean for child in left])
            deviations = np.sqrt([child.variance + node.spread for child in left])
            useful = np.array([child.utility for child in left])
            bonus = self._gamma * self._range * useful / max(float(useful.max()), 1e-30)
            node = left[int(np.argmax(generator.normal(means, deviations) + bonus))]
        places = node.places[free_N[node.places]]
        drawn = generator.normal(self.mean_N[places], np.sqrt(self.variance_N[places]))
        return int(places[np.argmax(drawn)])

    # Learning

    def learn(self, place: int, rewards: Float[np.ndarray, " K"], step: int) -> None:
        spread = float(np.abs(2 * (rewards - rewards.mean())).mean())
        value = float(np.clip(spread, self._least, 1 - self._least))
        seen = float(np.log(value / (1 - value)))
        mean, count, variance = self.mean_N[place], self.count_N[place], self.variance_N[place]
        first = self._visit_all_first and self.seen_at_N[place] < 0
        if first:
            kept, total = count, count + 1
        else:
            surprise = min((seen - mean) ** 2, self._range**2) / variance
            unseen = (step - self.seen_at_N[place] - 1) * self.pool.batch / len(self.pool)
            kept = float(np.clip(count * np.exp(-surprise), LEAST_COUNT, MOST_COUNT))
            total = min(kept + 1, MOST_COUNT)
            wider = variance * kept / total + np.log1p(surprise + max(unseen, 0.0)) / total
            self.variance_N[place] = np.clip(wider, LEAST_VARIANCE, (self._range / 3) ** 2)
        self.mean_N[place], self.count_N[place] = (kept * mean + seen) / total, total
        self.seen_at_N[place] = max(step, self.seen_at_N[place])

    def beliefs(self) -> dict[str, np.ndarray]:
        found = {"mean": self.mean_N, "count": self.count_N, "variance": self.variance_N}
        return found | {"seen_at": self.seen_at_N}

    def columns(self) -> dict[str, np.ndarray]:
        return {"productivity": 1 / (1 + np.exp(-self.mean_N))}


def _node(cluster: Cluster, pool: int, weights: Float[np.ndarray, " P"], utility: float = 0.0) -> _Node:
    """Make the nodes that have prompts of the pool. `weights` are those of targets, 0 for the pool."""
    utilities = _utilities(cluster, pool, weights)
    made = [_node(child, pool, weights, own) for child, own in zip(cluster.children, utilities, strict=True)]
    places = cluster.points[cluster.points < pool]
    return _Node([child for child in made if len(child.places)], places, utility)


def _utilities(cluster: Cluster, pool: int, weights: Float[np.ndarray, " P"]) -> Float[np.ndarray, " C"]:
    """Share of the siblings' target weight, smoothed, and smaller for clusters with few prompts of the pool."""
    held = np.array([weights[child.points].sum() for child in cluster.children])
    sizes = np.array([(child.points < pool).sum() for child in cluster.children])
    if not held.sum():
        return np.zeros(len(held))
    added = max(1e-8, SMOOTHING * held.sum() / len(held))
    shares = (held + added) / (held.sum() + added * len(held))
    found: np.ndarray = shares * sizes / (sizes + FEW * sizes.sum())
    return found


# -- the tree of prompts -------------------------------------------------------------------------------------------

SMALLEST = 0.01  # share of all points that a cluster has at least
EXPLAINED = 0.95  # share of the variance that the principal directions keep
MOST_CHILDREN = 8
SEPARATED = 0.2  # mean silhouette from which clusters count as such
ROUNDS = 25  # of k-means


@dataclass(frozen=True)
class Cluster:
    """A node: its children, or the points of a leaf."""

    children: tuple[Cluster, ...]
    points: Int[np.ndarray, " n"]  # rows of all points below it

    def leaves(self) -> Iterator[Cluster]:
        """The leaves below it, itself if it is one."""
        if not self.children:
            yield self
        for child in self.children:
            yield from child.leaves()


def prompt_tree(points_NE: Float[np.ndarray, "N E"], seed: int = 0) -> Cluster:
    """Divide points into clusters, those again, and so on.

    At each node: standardised features, principal directions that explain 95 % of the variance, and k-means with the
    number of clusters of the best silhouette, as long as that is 0.2 at least and no cluster has less than 1 % of all
    points.
    """
    smallest = max(2, int(SMALLEST * len(points_NE)))
    return _divided(points_NE.astype(np.float64), np.arange(len(points_NE)), smallest, np.random.default_rng(seed))


def _divided(
    points_NE: Float[np.ndarray, "N E"], rows: Int[np.ndarray, " n"], smallest: int, generator: np.random.Generator
) -> Cluster:
    labels = _clusters(_principal(points_NE[rows]), smallest, generator) if len(rows) >= 2 * smallest else np.zeros(0)
    parts = [rows[labels == label] for label in np.unique(labels)]
    if len(parts) < 2:
        return Cluster((), rows)
    return Cluster(tuple(_divided(points_NE, part, smallest, generator) for part in parts), rows)


def _principal(points_nE: Float[np.ndarray, "n E"]) -> Float[np.ndarray, "n D"]:
    deviations = points_nE.std(axis=0)
    scaled = (points_nE - points_nE.mean(axis=0)) / np.where(deviations > 1e-9, deviations, np.inf)
    vectors, values, _ = np.linalg.svd(scaled, full_matrices=False)
    shares = np.cumsum(values**2) / max(float((values**2).sum()), 1e-30)
    kept = int(np.searchsorted(shares, EXPLAINED)) + 1
    found: np.ndarray = vectors[:, :kept] * values[:kept]
    return found


def _clusters(
    points_nD: Float[np.ndarray, "n D"], smallest: int, generator: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """Labels by the number of clusters with the best silhouette; all 0 if none is good enough."""
    best, found = SEPARATED, np.zeros(len(points_nD), dtype=np.int64)
    for count in range(2, min(MOST_CHILDREN, len(points_nD) - 1) + 1):
        labels, distances = _k_means(points_nD, count, generator)
        silhouette = _silhouette(labels, distances)
        if silhouette > best and np.bincount(labels, minlength=count).min() >= smallest:
            best, found = silhouette, labels
    return found


def _k_means(
    points_nD: Float[np.ndarray, "n D"], count: int, generator: np.random.Generator
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n C"]]:
    """Labels, and squared distances to the centres, which begin far from each other (Arthur and Vassilvitskii 2007)."""
    centres = points_nD[[int(generator.integers(len(points_nD)))]]
    while len(centres) < count:
        nearest = squared_distances(points_nD, centres).min(axis=1)
        total = nearest.sum()
        chosen = generator.choice(len(points_nD), p=nearest / total if total > 0 else None)
        centres = np.concatenate([centres, points_nD[[int(chosen)]]])
    for _ in range(ROUNDS):
        labels = squared_distances(points_nD, centres).argmin(axis=1)
        moved = [points_nD[labels == c].mean(axis=0) if (labels == c).any() else centres[c] for c in range(count)]
        if np.allclose(moved, centres):
            break
        centres = np.array(moved)
    squares = squared_distances(points_nD, centres)
    return squares.argmin(axis=1), squares


def _silhouette(labels: Int[np.ndarray, " n"], squares_nC: Float[np.ndarray, "n C"]) -> float:
    """Mean of 1 - (distance to the own centre) / (distance to the nearest other) (simplified: Hruschka et al. 2004)."""
    rows = np.arange(len(labels))
    own, others = squares_nC[rows, labels], squares_nC.copy()
    others[rows, labels] = np.inf
    return float((1 - np.sqrt(own / np.maximum(others.min(axis=1), 1e-30))).mean())
