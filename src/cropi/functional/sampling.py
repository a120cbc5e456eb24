"""Sub-samples: how many to take from each stratum, what they weigh, and what a probe says of the rest. NumPy only."""

import math
from decimal import Decimal


def places(fraction: float, count: int) -> int:
    """ceil(fraction x count) of the fraction as it is written: 0.07 of 100 is 7, though 0.07 * 100 is above 7."""
    return math.ceil(Decimal(repr(fraction)) * count)
