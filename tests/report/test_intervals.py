import numpy as np
import pytest

from cropi.functional.bootstrap import bootstrap_mean
from cropi.report.intervals import stratified_mean

MANY = 20_000


def test_the_mean_is_that_of_the_sets_however_large_they_are():
    interval = stratified_mean([np.ones(98), np.zeros(2)], redraws=MANY, seed=0)
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.5, 0.5)  # nothing varies within a set


def test_one_set_has_the_interval_of_the_plain_bootstrap():
    values = np.array([0.0] * 60 + [1.0] * 40 + [0.5] * 20)
    ours = stratified_mean([values], redraws=MANY, seed=1)
    theirs = bootstrap_mean(values, redraws=20_000, confidence=0.95, seed=2)
    assert ours.mean == theirs.mean
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_two_sets_vary_as_theory_says():
    sets = [np.repeat([0.0, 1.0], (50, 50)), np.repeat([0.0, 1.0], (20, 180))]
    interval = stratified_mean(sets, redraws=MANY, seed=0)
    deviation = np.sqrt(0.25 / 100 + 0.09 / 200) / 2
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * deviation, rel=0.08)


@pytest.mark.parametrize("sets", [[], [np.ones(3), np.array([])]])
def test_no_questions_have_no_mean(sets):
    with pytest.raises(ValueError, match="no questions"):
        stratified_mean(sets, redraws=MANY, seed=0)
