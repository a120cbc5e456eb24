"""A tree of prompts by their representations: clusters within clusters, down to those that do not divide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

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
        nearest = _squares(points_nD, centres).min(axis=1)
        total = nearest.sum()
        chosen = generator.choice(len(points_nD), p=nearest / total if total > 0 else None)
        centres = np.concatenate([centres, points_nD[[int(chosen)]]])
    for _ in range(ROUNDS):
        labels = _squares(points_nD, centres).argmin(axis=1)
        moved = [points_nD[labels == c].mean(axis=0) if (labels == c).any() else centres[c] for c in range(count)]
        if np.allclose(moved, centres):
            break
        centres = np.array(moved)
    squares = _squares(points_nD, centres)
    return squares.argmin(axis=1), squares


def _silhouette(labels: Int[np.ndarray, " n"], squares_nC: Float[np.ndarray, "n C"]) -> float:
    """Mean of 1 - (distance to the own centre) / (distance to the nearest other) (simplified: Hruschka et al. 2004)."""
    rows = np.arange(len(labels))
    own, others = squares_nC[rows, labels], squares_nC.copy()
    others[rows, labels] = np.inf
    return float((1 - np.sqrt(own / np.maximum(others.min(axis=1), 1e-30))).mean())


def _squares(points_nD: Float[np.ndarray, "n D"], centres_CD: Float[np.ndarray, "C D"]) -> Float[np.ndarray, "n C"]:
    products = (points_nD**2).sum(axis=1)[:, None] + (centres_CD**2).sum(axis=1) - 2 * points_nD @ centres_CD.T
    found: np.ndarray = np.maximum(products, 0.0)
    return found
