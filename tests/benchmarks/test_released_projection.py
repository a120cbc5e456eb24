"""The faults in benchmarks/released_faults.py are those that were read in the released code."""

import numpy as np
import pytest
import released_faults as faults
import released_projection as benchmark
import torch
from released_figure import PUBLISHED, chance_mixture

from cropi.functional.projection import SparseProjection
from cropi.gradients.sketch import UniformMap, project

INTACT = {1.0: 3, 0.9: 4, 0.5: 6, 0.3: 10, 0.2: 14, 0.15: 16}
"""Of 16 rows of the 1.5B model, by kept share: 2^32 numbers hold so many row starts."""


@pytest.mark.parametrize("keep", INTACT)
def test_intact_rows_of_the_published_figure(keep: float) -> None:
    for features in (1_540_000_000, faults.RELEASED_FEATURES):
        kept = round(keep * features)
        assert faults.intact_rows(16, kept, 2**32) == INTACT[keep]
        wrapped = (np.arange(16, dtype=np.uint32) * np.uint32(kept)).tolist()  # the kernel's own arithmetic
        assert faults.faulty_starts(16, kept, 2**32) == wrapped
        assert sum(start == row * kept for row, start in enumerate(wrapped)) == INTACT[keep]


@pytest.mark.parametrize("keep", INTACT)
def test_our_rows_wrap_where_those_of_the_large_model_do(keep: float) -> None:
    kept, modulus = round(keep * 873_856), faults.scaled_modulus(873_856)
    assert faults.intact_rows(16, kept, modulus) == INTACT[keep]
    starts = faults.faulty_starts(16, kept, modulus)
    theirs = faults.faulty_starts(16, round(keep * faults.RELEASED_FEATURES), 2**32)
    np.testing.assert_allclose(np.array(starts) / modulus, np.array(theirs) / 2**32, atol=1e-4)


def loop_projection(rows: list[list[float]], matrix: np.ndarray, batch: int, modulus: int) -> list[list[float]]:
    """What the kernel does, one number at a time."""
    features, dim = matrix.shape
    found = []
    for row in range(len(rows)):
        members = rows[row // batch * batch : row // batch * batch + batch]
        memory = [value for member in members for value in member]
        offset = (row % batch) * features % modulus
        found.append([sum(memory[offset + c] * matrix[c, d] for c in range(features)) for d in range(dim)])
    return found


@pytest.mark.parametrize("modulus", [12, 23, 10_000])
def test_the_wrapped_projection_equals_a_plain_loop(modulus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "BLOCK", 4)
    rows = np.random.default_rng(3).standard_normal((10, 11))  # batches of 4, 4 and 2
    found = faults.dense_projection(rows, 5, np.random.default_rng(4), batch=4, modulus=modulus)
    parts = np.random.default_rng(4)
    blocks = [parts.standard_normal((width, 5), dtype=np.float32) for width in (4, 4, 3)]
    matrix = np.concatenate(blocks).astype(np.float64)
    np.testing.assert_allclose(found * 5**0.5, loop_projection(rows.tolist(), matrix, 4, modulus), rtol=1e-12)
    correct = faults.dense_projection(rows, 5, np.random.default_rng(4), batch=4)
    np.testing.assert_allclose(correct * 5**0.5, rows @ matrix, rtol=1e-12)
    assert np.array_equal(found, correct) == (modulus == 10_000)


def test_inner_products_are_those_of_the_rows_as_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "BLOCK", 4)
    rows = np.random.default_rng(5).standard_normal((32, 9))
    flat = [rows[start : start + 16].reshape(-1) for start in (0, 16)]
    read = np.array([flat[r // 16][r % 16 * 9 % 50 :][:9] for r in range(32)])
    np.testing.assert_allclose(faults.prefix_grams(rows, [9], 50)[9], read @ read.T, rtol=1e-12)
    for count, gram in faults.prefix_grams(rows, [2, 7, 9]).items():
        np.testing.assert_allclose(gram, rows[:, :count] @ rows[:, :count].T, rtol=1e-12)


def test_the_law_of_a_dense_projection_needs_inner_products_only() -> None:
    """Mean and variance of <Px, Py> over 4000 draws of S (Z^T Z / D) S^T: <x, y>, (|x|^2 |y|^2 + <x, y>^2) / D."""
    rows = np.random.default_rng(6).standard_normal((4, 3))  # of rank 3
    gram, root = rows @ rows.T, faults.root(rows @ rows.T)
    np.testing.assert_allclose(root @ root.T, gram, atol=1e-12)
    generator = np.random.default_rng(7)
    draws = np.stack([root @ faults.scatters(4, [8, 16], generator)[16] @ root.T for _ in range(4000)])
    variance = (np.outer(np.diag(gram), np.diag(gram)) + gram**2) / 16
    assert (abs(draws.mean(axis=0) - gram) < 5 * np.sqrt(variance / 4000)).all()
    np.testing.assert_allclose(draws.var(axis=0), variance, rtol=0.15)


def test_the_first_coordinates_of_the_large_model() -> None:
    """Its embedding is 15.1 % of it: half of that is half of ours, and all is all."""
    share = faults.RELEASED_EMBEDDING / faults.RELEASED_FEATURES
    assert share == pytest.approx(0.1512, abs=1e-4)
    assert faults.aligned_count(share / 2, 1000, 50_000) == 500
    assert faults.aligned_count((1 + share) / 2, 1000, 50_000) == 1000 + 24_500
    assert faults.aligned_count(1.0, 1000, 50_000) == 50_000


def test_a_sketch_of_fewer_buckets_is_folded_from_one_of_more() -> None:
    torch.manual_seed(8)
    gradients = {"w": torch.randn(20, 30, dtype=torch.float64), "b": torch.randn(40, dtype=torch.float64)}
    parameters = {name: torch.nn.Parameter(gradient) for name, gradient in gradients.items()}
    wide, narrow = (
        project(UniformMap(SparseProjection(dim, 0.5, seed=9, mask="uniform"), parameters), gradients)
        for dim in (64, 16)
    )
    torch.testing.assert_close(benchmark.narrowed(wide[None], 16)[0], narrow)


def test_neighbours_are_the_nearest_tenth_of_the_others() -> None:
    similarity = np.random.default_rng(10).standard_normal((21, 21))
    np.fill_diagonal(similarity, 100)
    for row, chosen in enumerate(benchmark.top_neighbours(similarity)):
        others = sorted((j for j in range(21) if j != row), key=lambda j: -similarity[row, j])
        assert np.flatnonzero(chosen).tolist() == sorted(others[:2])


def test_the_mixture_with_chance_by_hand() -> None:
    assert chance_mixture(0.766, 0.15) == pytest.approx(0.766)
    assert chance_mixture(0.766, 1.0) == pytest.approx(3 / 16 * (0.766 * 3 / 16 + 0.1 * 13 / 16) + 0.1 * 13 / 16)
    for keep in (1.0, 0.9, 0.5, 0.3, 0.2):
        assert abs(100 * chance_mixture(PUBLISHED["1.5B"][0.15] / 100, keep) - PUBLISHED["1.5B"][keep]) < 7
