"""Intervals: of a mean by the bootstrap, of a ratio of two means. NumPy only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REDRAWS = 2000  # over questions behind each interval
CONFIDENCE = 0.95  # coverage of the intervals


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float


def stratified_mean(sets: Sequence[np.ndarray], *, seed: int, redraws: int = REDRAWS) -> Interval:
    """Mean of the sets' means, with its percentile bootstrap interval over questions (Efron 1979).

    Samples of one question are not independent: pass their mean. Every set keeps its size and its weight: questions are
    redrawn with replacement within each set. Redrawing N questions is drawing how often each distinct value occurs, so
    one multinomial draw over the distinct values does it, exactly. Raises ValueError for no sets or an empty one.
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


def ratio_interval(top: float, top_var: float, bottom: float, bottom_var: float) -> tuple[float, float, float]:
    """top / bottom and its 95 % interval by Fieller's theorem, for independent means; unbounded if bottom may be 0."""
    z = 1.96**2
    ratio = top / bottom if bottom else float("inf")
    a = bottom**2 - z * bottom_var
    if a <= 0:
        return ratio, float("-inf"), float("inf")
    middle = top * bottom
    root = np.sqrt(max(middle**2 - a * (top**2 - z * top_var), 0.0))
    return ratio, float((middle - root) / a), float((middle + root) / a)
