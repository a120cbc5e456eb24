"""Principal points, against distances between the rows and their own definition."""

import numpy as np
import pytest

from cropi.functional import points as module
from cropi.functional.points import principal_points


def test_principal_points_keep_distances_up_to_one_scale() -> None:
    rows = np.random.default_rng(0).normal(size=(40, 5)) @ np.diag([3.0, 2.0, 1.0, 0.5, 0.1]) + 7
    points = principal_points(rows, dimensions=5)
    of_rows = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    of_points = np.linalg.norm(points[:, None] - points[None], axis=-1)
    scale = of_rows[0, 1] / of_points[0, 1]
    np.testing.assert_allclose(of_points * scale, of_rows, atol=1e-8)
    assert (points**2).sum(axis=1).mean() == pytest.approx(1.0)
    # the first two directions carry the most, so dropping the others changes least
    assert np.var(principal_points(rows, dimensions=2), axis=0).sum() > 0.95


def test_principal_points_by_blocks_and_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32)
    whole = principal_points(rows.astype(np.float64), dimensions=3)
    monkeypatch.setattr(module, "BLOCK", 7)
    parts = principal_points(rows[:25], rows[25:], dimensions=3)
    np.testing.assert_allclose(parts @ parts.T, whole @ whole.T, atol=1e-12)


def test_principal_points_of_equal_rows_are_all_zero() -> None:
    np.testing.assert_array_equal(principal_points(np.ones((4, 3))), np.zeros((4, 3)))
