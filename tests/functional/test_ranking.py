import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cropi.functional.ranking import ranks, reciprocal_rank_fusion, selection_size


def test_ties_break_by_id() -> None:
    assert ranks(np.array([1.0, 5.0, 1.0, 1.0]), ["c", "x", "a", "b"]).tolist() == [4, 1, 2, 3]


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        ranks(np.array([1.0, np.nan]), ["a", "b"])


def test_fusion_by_hand() -> None:
    ranks_NV = np.array([[1, 4], [3, 3], [2, 1]])
    np.testing.assert_allclose(reciprocal_rank_fusion(ranks_NV, kappa=60.0), [1 / 61 + 1 / 64, 2 / 63, 1 / 62 + 1 / 61])
    # kappa = 0: first in one list beats third in two
    fused_N = reciprocal_rank_fusion(np.array([[1, 4], [3, 3]]), kappa=0.0)
    assert fused_N[0] > fused_N[1]


def test_truncation_counts_only_the_head() -> None:
    np.testing.assert_allclose(reciprocal_rank_fusion(np.array([[1, 3], [3, 3]]), kappa=0.0, depth=2), [1.0, 0.0])


@given(st.permutations(range(1, 8)))
def test_one_list_keeps_its_order(order: list[int]) -> None:
    fused_N = reciprocal_rank_fusion(np.array(order)[:, None])
    assert np.argsort(-fused_N).tolist() == np.argsort(order).tolist()


@pytest.mark.parametrize(("fraction", "count", "expected"), [(0.1, 1000, 100), (0.07, 100, 7), (0.1, 11, 2)])
def test_selection_size_of_the_fraction_as_written(fraction: float, count: int, expected: int) -> None:
    assert selection_size(fraction, count) == expected
