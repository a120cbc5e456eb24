"""Intervals: of a mean by the bootstrap, of a ratio of two means. NumPy only."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

REDRAWS = 2000  # over questions behind each interval
CONFIDENCE = 0.95  # coverage of the intervals


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    values_N: Float[np.ndarray, " N"], *, seed: int, redraws: int = REDRAWS, confidence: float = CONFIDENCE
) -> Interval:
    """Mean over questions with its percentile bootstrap interval (Efron 1979), redrawing questions with replacement.

    Samples of one question are not independent: pass their mean. Raises ValueError without questions.
    """
    if not len(values_N):
        raise ValueError("cannot take the mean of no questions")
    generator = np.random.default_rng(seed)
    counts_RN = generator.multinomial(len(values_N), np.full(len(values_N), 1 / len(values_N)), size=redraws)
    means_R = counts_RN @ values_N / len(values_N)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means_R, [tail, 1 - tail])
    return Interval(float(values_N.mean()), float(low), float(high))


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
