"""Intervals of a mean over several test sets. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cropi.functional.bootstrap import CONFIDENCE, REDRAWS, Interval


def stratified_mean(sets: Sequence[np.ndarray], *, seed: int, redraws: int = REDRAWS) -> Interval:
    """Mean of the sets' means, with its percentile bootstrap interval over questions.

    Every set keeps its size and its weight: questions are redrawn with replacement within each set. Redrawing N
    questions is drawing how often each distinct value occurs, so one multinomial draw over the distinct values does it,
    exactly. Raises ValueError for no sets or an empty one.
    """
    if not sets or not all(len(values_N) for values_N in sets):
        raise ValueError("cannot take the mean of no questions")
    generator = np.random.default_rng(seed)
    means_RS = []
    for values_N in sets:
        distinct_U, counts_U = np.unique(values_N, return_counts=True)
        draws_RU = generator.multinomial(len(values_N), counts_U / len(values_N), size=redraws)
        means_RS.append(draws_RU @ distinct_U / len(values_N))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.mean(means_RS, axis=0), [tail, 1 - tail])
    mean = float(np.mean([values_N.mean() for values_N in sets]))
    return Interval(mean, float(low), float(high))
