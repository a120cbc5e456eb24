"""Sub-samples: how many to take from each stratum, what they weigh, and what a probe says of the rest. NumPy only."""

import math
from collections.abc import Sequence
from decimal import Decimal

import numpy as np
from jaxtyping import Float


def places(fraction: float, count: int) -> int:
    """ceil(fraction x count) of the fraction as it is written: 0.07 of 100 is 7, though 0.07 * 100 is above 7."""
    return math.ceil(Decimal(repr(fraction)) * count)


def allocate(sizes: Sequence[int], count: int) -> list[int]:
    """How many of `count` draws each stratum gets: as equal as their sizes allow, at least one each.

    Draws are dealt one at a time to the stratum with the fewest that has members left; among equals to the largest,
    then to the first. Never more than there are. ValueError where `count` does not reach every stratum with members.
    """
    strata = sum(size > 0 for size in sizes)
    if count < strata:
        raise ValueError(f"{count} draws cannot cover {strata} strata")
    taken = [0] * len(sizes)
    for _ in range(min(count, sum(sizes))):
        open_strata = [s for s, size in enumerate(sizes) if taken[s] < size]
        taken[min(open_strata, key=lambda s: (taken[s], -sizes[s], s))] += 1
    return taken


def balanced_factors(strata: Sequence[int], keys: Sequence[int], count: int) -> list[float]:
    """Factor of each member in a stratified sub-sample of `count`: n_s / m_s where it is drawn, 0 where it is not.

    Drawn without replacement within stratum s: its m_s members with the smallest keys, m_s from `allocate`. Where keys
    are exchangeable, E[factor] = 1 for every member (Horvitz & Thompson 1952), so the sum of factor x contribution has
    the sum over all members as its expectation. Stratum 0 stands for "contributes nothing": its members are not drawn
    and keep the factor 1.
    """
    members = {s: [k for k, stratum in enumerate(strata) if stratum == s] for s in sorted(set(strata) - {0})}
    factors = [float(stratum == 0) for stratum in strata]
    for inside, taken in zip(members.values(), allocate([len(m) for m in members.values()], count), strict=True):
        for k in sorted(inside, key=lambda k: (keys[k], k))[:taken]:
            factors[k] = len(inside) / taken
    return factors


def robust_line(old_N: Float[np.ndarray, " N"], new_N: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """(intercept, slope) of new on old by Theil's incomplete method (1950).

    Slope: the median over pairs half the sorted sample apart; intercept: the median of new - slope x old. Slope 0 where
    no pair differs in `old`. ValueError without points.
    """
    if not len(old_N):
        raise ValueError("a line needs points")
    order = np.argsort(old_N, kind="stable")
    half = len(order) - len(order) // 2
    runs_P, rises_P = (values_N[order[half:]] - values_N[order[: len(order) - half]] for values_N in (old_N, new_N))
    differ_P = runs_P > 0
    slope = float(np.median(rises_P[differ_P] / runs_P[differ_P])) if differ_P.any() else 0.0
    return float(np.median(new_N - slope * old_N)), slope
