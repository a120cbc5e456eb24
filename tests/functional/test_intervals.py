"""Intervals of a mean over test sets, against theory and a plain bootstrap."""

import numpy as np
import pytest

from cropi.functional.intervals import stratified_mean

MANY = 20_000


def test_the_mean_is_that_of_the_sets_however_large_they_are() -> None:
    interval = stratified_mean([np.ones(98), np.zeros(2)], redraws=MANY, seed=0)
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.5, 0.5)  # nothing varies within a set


def test_one_set_has_the_interval_of_the_plain_bootstrap() -> None:
    values = np.array([0.0] * 60 + [1.0] * 40 + [0.5] * 20)
    interval = stratified_mean([values], redraws=MANY, seed=1)
    redrawn = np.random.default_rng(2).choice(values, (MANY, len(values))).mean(axis=1)
    assert interval.mean == values.mean()
    assert (interval.low, interval.high) == pytest.approx(np.quantile(redrawn, [0.025, 0.975]), abs=0.01)


def test_same_seed_same_interval() -> None:
    values = [np.array([0.0, 1.0, 1.0])]
    assert stratified_mean(values, seed=1) == stratified_mean(values, seed=1)


def test_two_sets_vary_as_theory_says() -> None:
    sets = [np.repeat([0.0, 1.0], (50, 50)), np.repeat([0.0, 1.0], (20, 180))]
    interval = stratified_mean(sets, redraws=MANY, seed=0)
    deviation = np.sqrt(0.25 / 100 + 0.09 / 200) / 2
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * deviation, rel=0.08)


@pytest.mark.parametrize("sets", [[], [np.ones(3), np.array([])]])
def test_no_questions_have_no_mean(sets: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="no questions"):
        stratified_mean(sets, redraws=MANY, seed=0)
