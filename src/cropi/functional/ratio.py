"""The interval of a ratio of two means."""

import numpy as np


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
