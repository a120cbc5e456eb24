"""Times to a target, areas and paired redraws, against numbers by hand and brute force."""

import itertools
import math

import numpy as np
import pytest

from cropi.lab.compare.curve_statistics import (
    accuracy_curves,
    area_weights,
    costs_at,
    first_crossings,
    log_speedups,
    mean_over_seeds,
    percentile_interval,
    redraw_counts,
    seed_counts,
)


def test_a_crossing_lies_on_the_straight_line_between_two_evaluations():
    curves = np.array([[[0.2, 0.4, 0.8, 0.6], [0.2, 0.2, 0.2, 0.3], [0.7, 0.1, 0.1, 0.9]]])
    places = first_crossings(curves, np.array([0.5]))
    # 0.4 -> 0.8 meets 0.5 after a quarter; the second never does; the third stands above it before training.
    assert places[0, 0] == pytest.approx(1.25)
    assert math.isnan(places[0, 1])
    assert places[0, 2] == 0.0


def test_a_level_that_is_met_exactly_counts_and_rounding_does_not_hide_it():
    curves = np.array([[[0.1 + 0.2, 0.3, 0.5]]])
    assert first_crossings(curves, np.array([0.3]))[0, 0] == 0.0
    assert first_crossings(np.array([[[0.0, 0.3]]]), np.array([0.1 + 0.2]))[0, 0] == pytest.approx(1.0)


def test_every_redraw_has_a_level_of_its_own():
    curves = np.array([[[0.0, 1.0]], [[0.0, 1.0]]])
    assert first_crossings(curves, np.array([0.25, 0.75]))[:, 0].tolist() == [0.25, 0.75]


def test_what_is_paid_ahead_is_paid_in_full():
    ahead, running = np.array([0.0, 10.0, 10.0, 16.0]), np.array([0.0, 4.0, 8.0, 12.0])
    places = np.array([0.0, 0.5, 1.0, 1.5, 2.25, 3.0])
    assert costs_at(places, ahead, running).tolist() == [0.0, 12.0, 14.0, 16.0, 25.0, 28.0]


COSTS = np.array(
    [[[0, 0, 0], [0, 6, 6]], [[0, 4, 8], [0, 4, 8]]], float
)  # (ahead, running) of a reference and a strategy


@pytest.mark.parametrize(
    ("places", "one_step", "expected"),
    [
        ([1.5, 0.5], 0.1, 6 / 8),  # the reference at place 1.5: 6; the strategy at 0.5: 6 paid ahead + 2
        ([1.0, math.nan], 0.1, 4 / 14),  # never there: the time of its end
        ([0.0, 0.0], 0.1, 1.0),  # there before training
        ([0.0, math.nan], 0.1, 1.0),
        ([1.0, 0.001], 0.25, 4 / 7),  # no time is shorter than a step, 0.25 of an interval: 6 ahead + 1
    ],
)
def test_a_speed_up_is_the_cost_of_the_reference_over_that_of_the_strategy(places, one_step, expected):
    assert speedups(places, one_step) == pytest.approx([1.0, expected])


def speedups(places: list[float], one_step: float) -> list[float]:
    found = log_speedups(np.array([places]), np.array([places[0]]), COSTS, COSTS[:, 0], one_step)
    return np.exp(found[0]).tolist()


def test_areas_by_hand():
    nothing, steps = np.zeros(3), np.array([0.0, 2.0, 6.0])
    assert area_weights(nothing, steps, 6.0) == pytest.approx([1 / 6, 3 / 6, 2 / 6])  # the trapezoid rule
    # Cut in the middle of the second interval: the line from a1 to a2 up to its middle.
    assert area_weights(nothing, steps, 4.0) == pytest.approx([1 / 4, (1 + 1.5) / 4, 0.5 / 4])
    # A strategy that ends at 6 of 10 stays as it was.
    assert area_weights(nothing, steps, 10.0) == pytest.approx([0.1, 0.3, 0.6])
    # 4 are paid before the first step: the curve stays where it was while they are.
    assert area_weights(np.array([0.0, 4.0, 4.0]), steps, 6.0) == pytest.approx([(4 + 1) / 6, 1 / 6, 0.0])
    # All is spent before the first step.
    assert area_weights(np.array([0.0, 4.0, 4.0]), steps, 3.0) == pytest.approx([1.0, 0.0, 0.0])


def test_curves_are_means_over_the_redrawn_questions():
    correct = np.array([[[1, 0, 0], [1, 1, 0]], [[0, 0, 1], [1, 1, 1]]], float)
    curves = accuracy_curves(correct, np.array([[1, 1, 1], [3, 0, 0], [0, 1, 2]]))
    assert curves[0] == pytest.approx(np.array([[1 / 3, 2 / 3], [1 / 3, 1]]))
    assert curves[1].tolist() == [[1, 1], [0, 1]]
    assert curves[2] == pytest.approx(np.array([[0, 1 / 3], [2 / 3, 1]]))


def test_redraws_begin_with_the_sample_itself():
    counts = redraw_counts(5, 5, 100, np.random.default_rng(0))
    assert counts.shape == (101, 5)
    assert counts[0].tolist() == [1] * 5
    assert set(counts[1:].sum(axis=1)) == {5}
    assert counts[1:].std() > 0.5
    assert seed_counts(1, 10, np.random.default_rng(0)).tolist() == [[1]] * 11
    assert set(seed_counts(4, 10, np.random.default_rng(0))[1:].sum(axis=1)) == {3}


def test_redrawing_one_seed_less_has_the_variance_of_the_mean():
    """Brute force over all redraws of three seeds, two at a time: their mean has variance s^2 / 3."""
    values = np.array([1.0, 4.0, 10.0])
    counts = np.array([np.bincount(drawn, minlength=3) for drawn in itertools.product(range(3), repeat=2)])
    means = mean_over_seeds(np.broadcast_to(values[None, :, None], (9, 3, 1)), counts)[:, 0]
    assert means.var() == pytest.approx(values.var(ddof=1) / 3)
    drawn = seed_counts(3, 40_000, np.random.default_rng(0))
    means = mean_over_seeds(np.broadcast_to(values[None, :, None], (40_001, 3, 1)), drawn)[1:, 0]
    assert means.var() == pytest.approx(values.var(ddof=1) / 3, rel=0.03)


def test_the_interval_of_a_tiny_case_is_that_of_all_redraws():
    """Two seeds, two questions each: every outcome of the bootstrap, weighted by its probability."""
    correct = np.array([[1.0, 0.0], [1.0, 1.0]])
    outcomes = []
    for seed, first, second in itertools.product(range(2), range(2), range(2)):  # one seed of two, two questions of two
        outcomes.append(correct[seed, [first, second]].mean())
    generator = np.random.default_rng(1)
    questions = [redraw_counts(2, 2, 40_000, generator) for _ in range(2)]
    seeds = seed_counts(2, 40_000, generator)
    curves = [accuracy_curves(correct[s][None, None], questions[s])[..., 0] for s in range(2)]
    drawn = mean_over_seeds(np.stack(curves, axis=1), seeds)[1:, 0]
    for value in (0.0, 0.5, 1.0):
        assert np.mean(drawn == value) == pytest.approx(np.mean(np.array(outcomes) == value), abs=0.01)
    interval = percentile_interval(np.concatenate([[0.75], drawn]), 0.5)
    assert (interval.mean, interval.low, interval.high) == (0.75, 0.5, 1.0)
