"""Agreement of two scorings of the same prompts. NumPy only."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from cropi.functional.ranking import selection_size


def spearman(first_N: Float[np.ndarray, " N"], second_N: Float[np.ndarray, " N"]) -> float:
    """Rank correlation, with mean ranks for ties; NaN if one side is constant."""
    return pearson(_ranks(first_N), _ranks(second_N))


def pearson(first_N: Float[np.ndarray, " N"], second_N: Float[np.ndarray, " N"]) -> float:
    """Pearson correlation; NaN if one side is constant."""
    first_N, second_N = first_N - first_N.mean(), second_N - second_N.mean()
    lengths = math.sqrt(float(first_N @ first_N) * float(second_N @ second_N))
    return float(first_N @ second_N) / lengths if lengths else math.nan


def _ranks(values_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    _, places_N, counts_U = np.unique(values_N, return_inverse=True, return_counts=True)
    return (np.cumsum(counts_U) - (counts_U - 1) / 2)[places_N]


def top_overlap(found_N: Float[np.ndarray, " N"], true_N: Float[np.ndarray, " N"], share: float) -> float:
    """Share of the ceil(share N) highest of one scoring that are also among as many of the other (precision@share).

    Ties are broken by position, the first counting as higher. Chance gives `share`.
    """
    count = selection_size(share, len(true_N))
    best = [set(np.argsort(-values_N, kind="stable")[:count].tolist()) for values_N in (found_N, true_N)]
    return len(best[0] & best[1]) / count


def sign_agreement(first_N: Float[np.ndarray, " N"], second_N: Float[np.ndarray, " N"]) -> float:
    """Share of prompts whose scores have the same sign, among those with two non-zero scores; NaN without any."""
    both_N = (first_N != 0) & (second_N != 0)
    return float((np.sign(first_N) == np.sign(second_N))[both_N].mean()) if both_N.any() else math.nan


def disattenuated(correlation: float, first_reliability: float, second_reliability: float) -> float:
    """Correlation that two noisy scorings would have without noise: r / sqrt(r_1 r_2) (Spearman 1904).

    NaN if a reliability is not positive. Values above 1 come from chance.
    """
    if not (first_reliability > 0 and second_reliability > 0):
        return math.nan
    return correlation / math.sqrt(first_reliability * second_reliability)
