from statistics import NormalDist

import numpy as np
import pytest

from cropi.functional.ranking import Posterior, reliability, shrunk, top_probabilities


def simulated(count: int, spread: float, errors_N: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    true_N = 2.0 + spread * generator.standard_normal(count)
    return true_N, true_N + errors_N * generator.standard_normal(count)


def test_reliability_is_the_correlation_of_two_measurements() -> None:
    errors_N = np.full(100_000, 0.5)
    true_N, first_N = simulated(len(errors_N), 1.0, errors_N)
    second_N = true_N + errors_N * np.random.default_rng(9).standard_normal(len(errors_N))
    found = reliability(first_N, errors_N)
    assert found == pytest.approx(0.8, abs=0.01)
    assert found == pytest.approx(np.corrcoef(first_N, second_N)[0, 1], abs=0.01)
    assert reliability(first_N, np.full(len(errors_N), 9.0)) == 0.0
    assert reliability(np.ones(5), np.zeros(5)) == 0.0


def test_posteriors_cover_the_truth_as_often_as_they_say() -> None:
    errors_N = np.random.default_rng(1).uniform(0.1, 3.0, 50_000)
    true_N, seen_N = simulated(len(errors_N), 1.0, errors_N)
    posterior = shrunk(seen_N, errors_N)
    scores_N = (true_N - posterior.means_N) / posterior.deviations_N
    for level in (0.5, 0.9):
        covered = (np.abs(scores_N) < NormalDist().inv_cdf(0.5 + level / 2)).mean()
        assert covered == pytest.approx(level, abs=0.02)
    assert ((posterior.means_N - true_N) ** 2).mean() < ((seen_N - true_N) ** 2).mean() / 2


def test_without_noise_nothing_is_shrunk_and_without_signal_everything() -> None:
    values_N = np.array([1.0, 2.0, 6.0])
    exact = shrunk(values_N, np.zeros(3))
    assert exact.means_N.tolist() == values_N.tolist()
    assert not exact.deviations_N.any()
    noise = shrunk(values_N, np.full(3, 100.0))
    assert noise.means_N.tolist() == [3.0] * 3
    assert not noise.deviations_N.any()


def test_an_unknown_error_is_as_large_as_the_others() -> None:
    values_N, errors_N = np.array([0.0, 1.0, 4.0, 9.0]), np.array([0.5, 0.5, np.nan, 0.5])
    np.testing.assert_allclose(shrunk(values_N, errors_N).means_N, shrunk(values_N, np.full(4, 0.5)).means_N)


def test_probabilities_of_the_top_against_the_normal_integral() -> None:
    """Two prompts, one place: P(first > second) = Phi(difference / sqrt(sum of variances))."""
    posterior = Posterior(np.array([1.0, 0.0]), np.array([1.0, 0.5]))
    found = top_probabilities([posterior], 1, draws=20_000)
    assert found[0] == pytest.approx(NormalDist().cdf(1 / np.sqrt(1.25)), abs=0.01)
    assert found.sum() == pytest.approx(1.0)


def test_probabilities_are_calibrated_and_fill_the_places() -> None:
    errors_N = np.full(400, 0.7)
    expected, right = 0.0, 0
    for seed in range(30):
        true_N, seen_N = simulated(400, 1.0, errors_N, seed)
        chances_N = top_probabilities([shrunk(seen_N, errors_N)], 40, draws=100, seed=seed)
        assert chances_N.sum() == pytest.approx(40)
        chosen, best = np.argsort(-seen_N)[:40], set(np.argsort(-true_N)[:40].tolist())
        expected += chances_N[chosen].sum()
        right += len(best & set(chosen.tolist()))
    assert expected / 30 == pytest.approx(right / 30, rel=0.05)


def test_fused_rankings_count_all_sets() -> None:
    """First on both lists is always chosen; first on one and last on the other never, at a large kappa."""
    sure = np.zeros(5)
    first = Posterior(np.array([9.0, 8.0, 1.0, 2.0, 3.0]), sure)
    second = Posterior(np.array([9.0, 1.0, 8.0, 7.0, 6.0]), sure)
    assert top_probabilities([first, second], 1, kappa=60.0, draws=3).tolist() == [1, 0, 0, 0, 0]
    assert top_probabilities([first, second], 5).tolist() == [1.0] * 5
