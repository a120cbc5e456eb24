import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cropi.functional.influence_formulas import halves, influence, mean_cosines, mean_weights, reward_variance

G_ND = np.array([[3.0, 4.0], [-1.0, 0.0], [0.0, 0.0]])
D_VD = np.array([[1.0, 0.0], [0.0, 2.0]])
PRODUCTS_NV = G_ND @ D_VD.T
NORMS_N, NORMS_V = np.linalg.norm(G_ND, axis=1), np.linalg.norm(D_VD, axis=1)


def test_dot_and_cosine_by_hand() -> None:
    assert influence(PRODUCTS_NV, NORMS_N, NORMS_V).tolist() == [[3, 8], [-1, 0], [0, 0]]
    assert influence(PRODUCTS_NV, NORMS_N, NORMS_V, "cosine").tolist() == [[0.6, 0.8], [-1, 0], [0, 0]]


def test_gain_by_hand() -> None:
    # deviations 1/2, 0.4 and 0: verdicts of pass rates 0.5, 0.2 and 1
    found_NV = influence(PRODUCTS_NV, NORMS_N, NORMS_V, "gain", np.array([0.25, 0.16, 0.0]))
    np.testing.assert_allclose(found_NV, [[0.3, 0.4], [-0.4, 0], [0, 0]])


@given(st.integers(1, 9), st.integers(0, 9))
def test_the_variance_of_verdicts_is_learnability_to_the_bit(size: int, right: int) -> None:
    right = min(right, size)
    p = right / size
    assert reward_variance(np.array([1.0] * right + [0.0] * (size - right))) == p * (1 - p)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_the_variance_of_graded_rewards_is_numpys(rewards: list[float]) -> None:
    assert reward_variance(np.array(rewards)) == pytest.approx(np.var(rewards), abs=1e-15)
    assert reward_variance(np.full(len(rewards), rewards[0])) == 0  # exactly: equal rewards teach nothing


def test_the_variance_of_each_group() -> None:
    assert reward_variance(np.array([[0.0, 1.0], [0.3, 0.3], [np.nan, 1.0]])).tolist()[:2] == [0.25, 0]
    assert np.isnan(reward_variance(np.array([[np.nan, 1.0], [np.inf, np.inf]]))).all()
    assert np.isnan(reward_variance(np.zeros((3, 0)))).all()


def test_they_rank_differently() -> None:
    """A long gradient at an angle beats a short one straight ahead by `dot` alone."""
    products_NV, norms_N, norms_V = np.array([[3.0], [1.0]]), np.array([5.0, 1.0]), np.array([1.0])
    assert influence(products_NV, norms_N, norms_V).argmax() == 0
    assert influence(products_NV, norms_N, norms_V, "cosine").argmax() == 1


def test_what_is_not_finite_is_not_hidden() -> None:
    values_NV = influence(np.array([[np.nan], [1.0]]), np.array([np.nan, 1.0]), np.array([1.0]), "cosine")
    assert np.isnan(values_NV[0, 0])
    assert values_NV[1, 0] == 1


def test_mean_weights_by_hand() -> None:
    assert mean_weights(np.array([2.0, 0.0]), "plain", 2).tolist() == [0.5, 0.5]
    assert mean_weights(np.array([2.0, 0.0]), "normalized", 2).tolist() == [0.25, 0.0]
    assert mean_weights(np.array([2.0]), "normalized", 4).tolist() == [0.125]  # one of four


@given(st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=1, max_size=5))
def test_dot_with_the_mean_is_the_mean_of_dots_and_cosine_is_not(gradients: list[list[float]]) -> None:
    g_MD, own_D = np.array(gradients), np.array([1.0, -2.0, 0.5])
    direction_D = mean_weights(np.linalg.norm(g_MD, axis=1), "plain", len(g_MD)) @ g_MD
    assert own_D @ direction_D == pytest.approx(np.mean(g_MD @ own_D), abs=1e-9)


def test_cosine_with_the_mean_is_not_the_mean_of_cosines() -> None:
    g_MD, own_D = np.array([[10.0, 0.0], [0.0, 1.0]]), np.array([0.0, 1.0])
    norms_M = np.linalg.norm(g_MD, axis=1)
    mean_D = mean_weights(norms_M, "plain", 2) @ g_MD
    length = np.array([np.linalg.norm(mean_D)])
    of_mean = influence(np.array([[own_D @ mean_D]]), np.ones(1), length, "cosine")[0, 0]
    each = influence((g_MD @ own_D)[None], np.ones(1), norms_M, "cosine")
    assert each.mean() == 0.5
    assert of_mean == pytest.approx(1 / 101**0.5)
    balanced_D = mean_weights(norms_M, "normalized", 2) @ g_MD
    assert own_D @ balanced_D == pytest.approx(each.mean())  # the mean of cosines is linear in scaled gradients


def test_halves_are_dealt_by_key() -> None:
    keys = {"a": 0.9, "b": 0.1, "c": 0.5, "d": 0.3, "e": 0.5}
    assert halves(keys, 4) == (["b", "c"], ["d", "e"])  # b, d, c, e in turn; c before e at equal keys
    assert halves(keys, 100) == (["a", "b", "c"], ["d", "e"])


def test_mean_cosines_by_hand() -> None:
    # |g| = 2, 5 and 0; halves of one prompt and of three
    products_N2 = np.array([[1.0, -1.0], [2.0, 3.0], [0.0, 0.0], [4.0, 1.0], [4.0, 1.0], [4.0, 1.0]])
    lengths_N = np.array([2.0, 5.0, 0.0, 4.0, 4.0, 4.0])
    in_half_N2 = np.array([[0, 0], [1, 0], [0, 0], [0, 1], [0, 1], [0, 1]], dtype=bool)
    found_N = mean_cosines(products_N2, lengths_N, in_half_N2)
    # outside both: (1 x 0.5 + 3 x -0.5) / 4; in the first half: the second alone; in the second: the first alone
    assert found_N.tolist() == pytest.approx([-0.25, 0.6, 0, 1, 1, 1])
