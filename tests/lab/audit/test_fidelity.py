"""Audits with known answers: trajectories are made up, so that their true influence is known."""

from __future__ import annotations

import numpy as np
import pytest

from cropi.gradients.groups import RatioStatistics, SurrogateSettings
from cropi.lab.audit.fidelity import Comparison, gradient_cosines
from cropi.lab.audit.trajectory_products import TrajectoryProducts

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

SETTINGS = SurrogateSettings("constant", 1, advantage_std=False)


def made_up(
    generator: np.random.Generator, influence: float, count: int, noise: float, tilt: float = 1.0
) -> TrajectoryProducts:
    """Trajectories, half of them right; right ones have the product `influence` more than wrong ones on average."""
    rewards_K = np.arange(count) % 2 * 1.0
    products_K = tilt * influence * rewards_K * 2 + noise * generator.standard_normal(count)
    gram_KK = np.eye(count)
    return TrajectoryProducts(rewards_K, np.ones(count, int), products_K[:, None], gram_KK, [RatioStatistics()] * count)


def influences(prompts: int, *, seed: int, bias: float) -> tuple[np.ndarray, np.ndarray]:
    """True ones, standard normal; and seen ones, of which `bias` is another draw."""
    truth_N, other_N = np.random.default_rng(seed).standard_normal((2, prompts))
    return truth_N, np.sqrt(1 - bias) * truth_N + np.sqrt(bias) * other_N


def compared(prompts: int, *, stored: int, fresh: int, noise: float, seed: int, bias: float = 0.0) -> Comparison:
    """Trajectories whose means are those influences."""
    generator = np.random.default_rng(seed + 1000)
    truth_N, seen_N = influences(prompts, seed=seed, bias=bias)
    old = [made_up(generator, influence, stored, noise) for influence in seen_N]
    new = [made_up(generator, influence, fresh, noise) for influence in truth_N]
    return Comparison(old, new, (0, 0, 0), SETTINGS, 0.1, 0)


def values(comparison: Comparison) -> dict[str, float]:
    return {name: part["value"] for name, part in comparison.error_parts().items()}


def test_without_drift_stored_trajectories_reach_the_ceiling() -> None:
    for row in compared(200, stored=8, fresh=32, noise=1.5, seed=0).by_count():
        for measure in ("spearman", "top_overlap", "sign_agreement"):
            off, ceiling = row["off_policy"][measure], row["ceiling"][measure]  # type: ignore[index]
            assert off["low"] < ceiling["high"]
            assert ceiling["low"] < off["high"]


def test_a_planted_bias_is_told_from_noise() -> None:
    clean, biased = (compared(500, stored=8, fresh=32, noise=1.5, seed=1, bias=bias) for bias in (0.0, 0.5))
    truth_N, seen_N = influences(500, seed=1, bias=0.5)
    (off, ceiling) = (biased._at(8, 24)[side]["spearman"] for side in ("off_policy", "ceiling"))  # type: ignore[index]
    assert off["high"] < ceiling["low"]
    parts = {name: values(one) for name, one in (("clean", clean), ("biased", biased))}
    assert parts["clean"]["bias"] == pytest.approx(0.0, abs=0.1)
    assert parts["biased"]["bias"] == pytest.approx(((seen_N - truth_N) ** 2).mean() / truth_N.var(), abs=0.15)
    assert parts["clean"]["slope"] == pytest.approx(1.0, abs=0.06)
    assert parts["biased"]["slope"] == pytest.approx(np.cov(seen_N, truth_N)[0, 1] / truth_N.var(), abs=0.06)
    assert clean.overall()["pearson_without_noise"] == pytest.approx(1.0, abs=0.05)
    assert biased.overall()["pearson_without_noise"] == pytest.approx(np.corrcoef(seen_N, truth_N)[0, 1], abs=0.06)


def test_noise_alone_raises_the_variance_and_lowers_the_ceiling() -> None:
    quiet, loud = (compared(300, stored=8, fresh=32, noise=noise, seed=2) for noise in (0.5, 3.0))
    # an influence of 8 trajectories is a mean over four right ones less one over four wrong ones, divided by 2
    assert values(quiet)["variance"] == pytest.approx(0.5**2 / 8 * 2 / 2 * 4 / 4, rel=0.3)
    ceilings = [c._at(8, 24)["ceiling"]["spearman"]["value"] for c in (quiet, loud)]  # type: ignore[index]
    assert ceilings[0] > ceilings[1] + 0.3
    assert values(loud)["bias"] == pytest.approx(0.0, abs=0.3)


def test_gradient_cosines_of_equal_and_of_unrelated_gradients() -> None:
    """Right trajectories of every prompt share a direction; stored ones point along another in half of the prompts."""
    generator, together = np.random.default_rng(4), []
    for prompt in range(40):
        fresh = np.array([1.0, 0.0, 0.0])
        stored = fresh if prompt % 2 else np.array([0.0, 1.0, 0.0])
        features = np.array([stored * (k % 2) for k in range(8)] + [fresh * (k % 2) for k in range(16)])
        features = features + 1e-3 * generator.standard_normal(features.shape)
        rewards = np.array([k % 2 * 1.0 for k in range(24)])
        products = TrajectoryProducts(
            rewards, np.ones(24, dtype=np.int64), np.zeros((24, 1)), features @ features.T, [RatioStatistics()] * 24
        )
        together.append((products, 8))
    found = gradient_cosines(together, SETTINGS, 0)
    assert found["ceiling"]["median"] == pytest.approx(1.0, abs=1e-3)
    assert found["off_policy"]["above_0.6"] == pytest.approx(0.5, abs=0.1)
