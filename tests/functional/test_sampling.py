from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cropi.functional.sampling import allocate, balanced_factors, places, robust_line


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([4, 4], 4, [2, 2]),
        ([1, 7], 4, [1, 3]),
        ([7, 1], 2, [1, 1]),
        ([3, 5], 3, [1, 2]),  # the odd one to the larger
        ([4, 4], 3, [2, 1]),
        ([2, 2], 9, [2, 2]),
        ([0, 5], 3, [0, 3]),
        ([], 2, []),
    ],
)
def test_allocation_by_hand(sizes: list[int], count: int, expected: list[int]) -> None:
    assert allocate(sizes, count) == expected


@given(st.lists(st.integers(0, 9), max_size=4), st.integers(4, 20))
def test_allocation_is_complete_and_as_equal_as_sizes_allow(sizes: list[int], count: int) -> None:
    taken = allocate(sizes, count)
    assert sum(taken) == min(count, sum(sizes))
    assert all(0 <= t <= size and (t > 0 or size == 0) for t, size in zip(taken, sizes, strict=True))
    assert all(
        other <= t + 1
        for t, size in zip(taken, sizes, strict=True)
        if t < size  # only a stratum that is used up lags behind by more than one
        for other in taken
    )


def test_fewer_draws_than_strata_are_refused() -> None:
    with pytest.raises(ValueError, match="1 draws cannot cover 2 strata"):
        allocate([3, 5], 1)


@pytest.mark.parametrize("strata", [[1, -1, -1, -1], [1, 1, -1, -1, -1], [1, 0, -1, 1, 0, 1], [1, 1, 1]])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_over_all_draws_each_member_weighs_one(strata: list[int], count: int) -> None:
    draws = [balanced_factors(strata, list(keys), count) for keys in permutations(range(len(strata)))]
    assert np.mean(draws, axis=0) == pytest.approx(np.ones(len(strata)))
    for factors in draws:
        assert sum(factor != 0 and s != 0 for factor, s in zip(factors, strata, strict=True)) == min(
            count, sum(s != 0 for s in strata)
        )
        for sign in {1, -1} & set(strata):
            inside = [factor for factor, s in zip(factors, strata, strict=True) if s == sign]
            assert sum(inside) == pytest.approx(len(inside))
            assert len({factor for factor in inside if factor}) == 1


def test_smallest_keys_are_drawn() -> None:
    assert balanced_factors([1, 1, -1, -1, -1], [9, 2, 5, 1, 7], 3) == [0.0, 2.0, 1.5, 1.5, 0.0]


@pytest.mark.parametrize(("fraction", "count", "expected"), [(0.1, 1000, 100), (0.07, 100, 7), (0.1, 11, 2)])
def test_places_of_the_fraction_as_written(fraction: float, count: int, expected: int) -> None:
    assert places(fraction, count) == expected


@pytest.mark.parametrize("count", [2, 3, 10, 11])
def test_a_line_is_found(count: int) -> None:
    old_N = np.arange(count, dtype=float)[::-1]
    assert robust_line(old_N, 3.0 - 2.0 * old_N) == pytest.approx((3.0, -2.0))


def test_a_tenth_of_wild_points_leaves_the_line_where_it_was() -> None:
    rng = np.random.default_rng(0)
    old_N = rng.normal(size=200)
    new_N = 1.0 + 0.5 * old_N + 0.01 * rng.normal(size=200)
    new_N[rng.choice(200, 20, replace=False)] += 1e6
    assert robust_line(old_N, new_N) == pytest.approx((1.0, 0.5), abs=0.02)


def test_no_run_no_slope_and_no_points_no_line() -> None:
    assert robust_line(np.array([2.0, 2.0, 2.0]), np.array([1.0, 5.0, 3.0])) == (3.0, 0.0)
    with pytest.raises(ValueError, match="points"):
        robust_line(np.array([]), np.array([]))
