import numpy as np
import pytest

from cropi.functional.alignment import halves, mean_cosines


def test_halves_are_dealt_by_key() -> None:
    keys = {"a": 0.9, "b": 0.1, "c": 0.5, "d": 0.3, "e": 0.5}
    assert halves(keys, 4) == (["b", "c"], ["d", "e"])  # b, d, c, e in turn; c before e at equal keys
    assert halves(keys, 100) == (["a", "b", "c"], ["d", "e"])
    with pytest.raises(ValueError, match="1 ids"):
        halves({"a": 0.0}, 5)


def test_mean_cosines_by_hand() -> None:
    # |g| = 2, 5 and 0; halves of one prompt and of three
    products_N2 = np.array([[1.0, -1.0], [2.0, 3.0], [0.0, 0.0], [4.0, 1.0], [4.0, 1.0], [4.0, 1.0]])
    lengths_N = np.array([2.0, 5.0, 0.0, 4.0, 4.0, 4.0])
    in_half_N2 = np.array([[0, 0], [1, 0], [0, 0], [0, 1], [0, 1], [0, 1]], dtype=bool)
    found_N = mean_cosines(products_N2, lengths_N, in_half_N2)
    # outside both: (1 x 0.5 + 3 x -0.5) / 4; in the first half: the second alone; in the second: the first alone
    assert found_N.tolist() == pytest.approx([-0.25, 0.6, 0, 1, 1, 1])
