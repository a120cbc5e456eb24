import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cropi.functional.advantages import group_advantages


def test_hand_computed_with_bessel_deviation() -> None:
    # mean 1/4, deviations (3/4, -1/4, -1/4, -1/4), variance (9/16 + 3/16) / 3 = 1/4, deviation 1/2
    advantages_K = group_advantages(np.array([1.0, 0.0, 0.0, 0.0]))
    expected_K = np.array([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4)
    np.testing.assert_allclose(advantages_K, expected_K, rtol=1e-12)


def test_without_deviation_is_dr_grpo() -> None:
    advantages_K = group_advantages(np.array([1.0, 1.0, 0.0, 0.0]), std=False)
    assert advantages_K.tolist() == [0.5, 0.5, -0.5, -0.5]


@given(st.floats(-1e6, 1e6), st.integers(2, 9))
def test_equal_rewards_give_exactly_zero(value: float, count: int) -> None:
    assert group_advantages(np.full(count, value)).tolist() == [0.0] * count


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.floats(-5, 5))
def test_sums_to_zero_and_ignores_a_shift(rewards: list[float], shift: float) -> None:
    rewards_K = np.array(rewards)
    advantages_K = group_advantages(rewards_K, std=False)
    assert abs(float(advantages_K.sum())) < 1e-9
    np.testing.assert_allclose(group_advantages(rewards_K + shift, std=False), advantages_K, rtol=0, atol=1e-9)


def test_one_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(np.array([1.0]))


def test_groups_side_by_side_are_groups_one_by_one() -> None:
    rewards_NK = np.random.default_rng(0).integers(0, 2, (5, 4)).astype(float)
    alone = np.stack([group_advantages(rewards_K) for rewards_K in rewards_NK])
    np.testing.assert_array_equal(group_advantages(rewards_NK), alone)
