import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cropi.functional.ranking import spearman_brown
from cropi.lab.audit.agreement import (
    disattenuated,
    pearson,
    sign_agreement,
    spearman,
    top_overlap,
)


def slow_ranks(values: list[float]) -> list[float]:
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


@given(st.lists(st.integers(-5, 5), min_size=3, max_size=30))
def test_correlations_against_the_standard_library(values: list[int]) -> None:
    first_N = np.array(values, dtype=float)
    second_N = np.roll(first_N, 1) + 0.5 * first_N
    first, second = first_N.tolist(), second_N.tolist()
    if np.ptp(first_N) == 0 or np.ptp(second_N) == 0:
        assert np.isnan(pearson(first_N, second_N))
        assert np.isnan(spearman(first_N, second_N))
    else:
        assert pearson(first_N, second_N) == pytest.approx(statistics.correlation(first, second), abs=1e-9)
        ranked = statistics.correlation(slow_ranks(first), slow_ranks(second))
        assert spearman(first_N, second_N) == pytest.approx(ranked, abs=1e-9)


def test_top_overlap_by_hand() -> None:
    true_N, found_N = np.array([9.0, 8, 7, 6, 5, 4]), np.array([9.0, 1, 8, 0, 0, 7])
    assert top_overlap(found_N, true_N, 0.5) == pytest.approx(2 / 3)
    assert top_overlap(true_N, true_N, 0.1) == 1.0


def test_signs_of_zeros_do_not_count() -> None:
    assert sign_agreement(np.array([1.0, -1.0, 0.0, 2.0]), np.array([3.0, 1.0, 1.0, 0.0])) == 0.5
    assert np.isnan(sign_agreement(np.zeros(2), np.ones(2)))


def test_a_test_twice_as_long() -> None:
    assert spearman_brown(0.5) == pytest.approx(2 / 3)


def test_noise_taken_out_of_a_correlation() -> None:
    """True scores correlate with 0.6; each side is seen with noise of its own, and its reliability is known."""
    generator = np.random.default_rng(0)
    true_N2 = generator.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=200_000)
    seen_N2 = true_N2 + generator.standard_normal(true_N2.shape) * np.sqrt([1.0, 3.0])
    raw = pearson(seen_N2[:, 0], seen_N2[:, 1])
    assert raw == pytest.approx(0.6 * np.sqrt(1 / 2 * 1 / 4), abs=0.01)
    assert disattenuated(raw, 1 / 2, 1 / 4) == pytest.approx(0.6, abs=0.03)
    assert np.isnan(disattenuated(raw, 0.0, 0.5))
