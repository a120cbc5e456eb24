import numpy as np
import pytest

from cropi.functional.intervals import bootstrap_mean


def test_interval_of_a_coin_meets_the_normal_one() -> None:
    values_N = np.array([1.0] * 120 + [0.0] * 280)
    interval = bootstrap_mean(values_N, redraws=20_000, confidence=0.95, seed=0)
    half = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    assert interval.mean == pytest.approx(0.3)
    assert interval.low == pytest.approx(0.3 - half, abs=0.004)
    assert interval.high == pytest.approx(0.3 + half, abs=0.004)


def test_same_seed_same_interval_and_certainty_has_no_width() -> None:
    values_N = np.array([0.0, 1.0, 1.0])
    first = bootstrap_mean(values_N, redraws=100, confidence=0.9, seed=1)
    assert first == bootstrap_mean(values_N, redraws=100, confidence=0.9, seed=1)
    sure = bootstrap_mean(np.ones(5), redraws=100, confidence=0.9, seed=1)
    assert (sure.low, sure.high) == pytest.approx((1.0, 1.0))


def test_no_questions_is_refused() -> None:
    with pytest.raises(ValueError, match="no questions"):
        bootstrap_mean(np.array([]), redraws=10, confidence=0.9, seed=0)
