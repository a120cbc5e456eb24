"""Strategies against each other over seeds and questions: times to a target, areas, paired intervals. NumPy only.

Further letters of this module: `S` seeds, `A` strategies, `E` evaluations, `Q` questions, `R` redraws. Row 0 of
every array over redraws is the sample itself, so that one computation gives estimate and interval.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from cropi.functional.intervals import Interval

ROUNDING = 1e-12  # two means of means that are equal on paper may differ by this much


def redraw_counts(count: int, draws: int, redraws: int, generator: np.random.Generator) -> Int[np.ndarray, "R N"]:
    """Redraw `count` things, `draws` with replacement: how often each is drawn; row 0: each once. R = redraws + 1."""
    drawn_RN = generator.multinomial(draws, np.full(count, 1 / count), size=redraws)
    return np.concatenate([np.ones((1, count), dtype=drawn_RN.dtype), drawn_RN])


def seed_counts(count: int, redraws: int, generator: np.random.Generator) -> Int[np.ndarray, "R S"]:
    """Redraws of S seeds: S - 1 of them at a time, which makes the variance of their mean unbiased (Rao and Wu 1988).

    Redrawing S of S would give (S - 1) / S of it: a tenth of the width too little at five seeds. One seed stays.
    """
    return redraw_counts(count, max(count - 1, 1), redraws, generator)


def accuracy_curves(
    correct_AEQ: Float[np.ndarray, "A E Q"], counts_RQ: Int[np.ndarray, "R Q"]
) -> Float[np.ndarray, "R A E"]:
    """Mean verdict of every strategy and evaluation, over the redrawn questions: the same redraw for all strategies."""
    strategies, evaluations, questions = correct_AEQ.shape
    sums_RAE = counts_RQ.astype(float) @ correct_AEQ.reshape(strategies * evaluations, questions).T
    return (sums_RAE / counts_RQ.sum(axis=1, keepdims=True)).reshape(len(counts_RQ), strategies, evaluations)


def first_crossings(
    curves_RAE: Float[np.ndarray, "R A E"], levels_R: Float[np.ndarray, " R"]
) -> Float[np.ndarray, "R A"]:
    """Find where each curve first reaches a level, as a place among the evaluations: 2.5 is half-way from the third
    to the fourth, by a straight line. 0 where the first one is there already; NaN where none is.
    """
    reached_RAE = curves_RAE >= levels_R[:, None, None] - ROUNDING
    last_RA = reached_RAE.argmax(axis=-1)
    first_RA = np.maximum(last_RA - 1, 0)
    below_RA, above_RA = (
        np.take_along_axis(curves_RAE, places_RA[..., None], axis=-1)[..., 0] for places_RA in (first_RA, last_RA)
    )
    rise_RA = np.where(last_RA > 0, above_RA - below_RA, 1.0)
    share_RA = np.where(last_RA > 0, (levels_R[:, None] - below_RA) / rise_RA, 0.0).clip(0.0, 1.0)
    return np.where(reached_RAE.any(axis=-1), first_RA + share_RA, np.nan)


def costs_at(
    places_R: Float[np.ndarray, " R"], ahead_E: Float[np.ndarray, " E"], running_E: Float[np.ndarray, " E"]
) -> Float[np.ndarray, " R"]:
    """Cost up to a place among the evaluations.

    What runs along with the steps is counted up to the place, what is paid ahead of them (collection, scores) in full
    as soon as the place lies beyond the evaluation before: nothing is trained on a selection before it is paid.
    """
    after_R = np.ceil(places_R).astype(int)
    return ahead_E[after_R] + np.interp(places_R, np.arange(len(running_E)), running_E)


def log_speedups(
    places_RA: Float[np.ndarray, "R A"],
    reference_R: Float[np.ndarray, " R"],
    costs_AE: Float[np.ndarray, "2 A E"],
    reference_costs_E: Float[np.ndarray, "2 E"],
    one_step: float,
) -> Float[np.ndarray, "R A"]:
    """log(time of the reference / time of the strategy), for places of `first_crossings`; costs are (ahead, running).

    A strategy that never reaches the level (NaN) is given the time at which its run ended, so its ratio is too high: an
    upper bound. A level that the reference has before training (place 0, in a redraw) allows no gain: 0.
    No time is shorter than that of one step (`one_step`, as a place).
    """
    end = costs_AE.shape[-1] - 1
    own_RA = np.maximum(np.where(np.isnan(places_RA), end, places_RA), one_step)
    theirs_R = costs_at(np.maximum(reference_R, one_step), *reference_costs_E)
    times_RA = np.stack([costs_at(own_RA[:, a], *costs_AE[:, a]) for a in range(places_RA.shape[1])], axis=1)
    return np.where((reference_R > 0)[:, None], np.log(theirs_R)[:, None] - np.log(times_RA), 0.0)


def restricted_costs(
    places_RA: Float[np.ndarray, "R A"], costs_AE: Float[np.ndarray, "2 A E"]
) -> Float[np.ndarray, "R A"]:
    """Cost up to places of `first_crossings`; up to the end of the run where the level is never reached.

    The mean over runs is the restricted mean of survival analysis (Royston and Parmar 2013): with all runs of one
    length it compares strategies although some never arrive.
    """
    end = costs_AE.shape[-1] - 1
    own_RA = np.where(np.isnan(places_RA), end, places_RA)
    return np.stack([costs_at(own_RA[:, a], *costs_AE[:, a]) for a in range(places_RA.shape[1])], axis=1)


def area_weights(
    ahead_E: Float[np.ndarray, " E"], running_E: Float[np.ndarray, " E"], limit: float
) -> Float[np.ndarray, " E"]:
    """w with mean accuracy over costs 0 to `limit` = sum_e w_e accuracy_e. The weights add up to 1.

    Between two evaluations the curve is flat while something is paid ahead and then a straight line; behind the last
    one it stays as it was.
    """
    weights_E = np.zeros(len(running_E))
    at = 0.0
    for right in range(1, len(running_E)):
        left = right - 1
        flat = ahead_E[right] - ahead_E[left]
        weights_E[left] += max(0.0, min(at + flat, limit) - at)
        at += flat
        length = running_E[right] - running_E[left]
        part = max(0.0, min(at + length, limit) - at)
        if part:
            weights_E[left] += part * (1 - part / length / 2)
            weights_E[right] += part * part / length / 2
        at += length
    weights_E[-1] += max(0.0, limit - at)
    return weights_E / limit


def mean_over_seeds(
    values_RSA: Float[np.ndarray, "R S A"], counts_RS: Int[np.ndarray, "R S"]
) -> Float[np.ndarray, "R A"]:
    """Mean over the redrawn seeds."""
    return np.einsum("rsa,rs->ra", values_RSA, counts_RS / counts_RS.sum(axis=1, keepdims=True))


def worst_tenth(values_C: Float[np.ndarray, " C"], counts_RC: Int[np.ndarray, "R C"]) -> Float[np.ndarray, " R"]:
    """Mean of the lowest tenth of the redrawn values. Of 15 values it is the lowest and half of the second lowest."""
    order_C = np.argsort(values_C, kind="stable")
    share_RC = counts_RC[:, order_C] / counts_RC.sum(axis=1, keepdims=True)
    left_RC = 0.1 - (np.cumsum(share_RC, axis=1) - share_RC)
    return np.clip(left_RC, 0.0, share_RC) @ values_C[order_C] / 0.1


def percentile_interval(values_R: Float[np.ndarray, " R"], confidence: float) -> Interval:
    """The estimate (row 0) with the percentiles of the redraws (the other rows)."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(values_R[1:], [tail, 1 - tail])
    return Interval(float(values_R[0]), float(low), float(high))
