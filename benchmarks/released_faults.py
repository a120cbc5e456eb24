"""The projection of the paper's released code, with its two faults; for benchmarks/released_projection.py alone.

Fault 1: the mask keeps the first coordinates, in parameter order (`aligned_count` compares models of other shapes).
Fault 2: the kernel of the dense projection computes the start of each row of a batch with 32 bits, so that rows beyond
2^32 numbers are read from elsewhere.

Axes: R rows (gradients), F features (coordinates kept of them), D projected dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

# Of the published figure: Qwen2.5-1.5B, whose first parameter is the embedding, tied to the head. The rows of one
# kernel call are not published: 16 is what fits (research/findings/projection.md).
WORD = 1 << 32
RELEASED_BATCH = 16
RELEASED_FEATURES = 1_543_714_304
RELEASED_EMBEDDING = 151_936 * 1_536

BLOCK = 1 << 13  # columns in memory at once


def intact_rows(batch: int, features: int, modulus: int) -> int:
    """How many rows of a batch the faulty kernel reads where they are: those with r * features < modulus."""
    return min(batch, -(-modulus // features))


def faulty_starts(batch: int, features: int, modulus: int) -> list[int]:
    """Where in the flat buffer the faulty kernel looks for row r: r * features, modulo 2^32 in the released code."""
    return [row * features % modulus for row in range(batch)]


def scaled_modulus(features: int) -> int:
    """The modulus by which gradients of `features` numbers wrap where those of the 1.5B model do by 2^32."""
    return round(WORD * features / RELEASED_FEATURES)


def read_rows(
    rows_RF: np.ndarray, columns: slice, *, batch: int = RELEASED_BATCH, modulus: int | None = None
) -> np.ndarray:
    """Some columns of all rows, as a kernel finds them that is given `batch` rows at a time. No modulus: no fault.

    Only the start of a row wraps; columns are counted from there with 64 bits, across the ends of rows.
    """
    if modulus is None:
        return np.ascontiguousarray(rows_RF[:, columns])
    features = rows_RF.shape[1]
    starts = faulty_starts(batch, features, modulus)
    flat = rows_RF.reshape(-1)
    found = np.empty((len(rows_RF), columns.stop - columns.start), rows_RF.dtype)
    for row in range(len(rows_RF)):
        start = row // batch * batch * features + starts[row % batch]  # never beyond the row's own place
        found[row] = flat[start + columns.start : start + columns.stop]
    return found


def aligned_count(keep: float, embedding: int, features: int) -> int:
    """How many first coordinates hold the share of the embedding, and of the rest, that the first `keep` of the 1.5B
    model's hold of its own."""
    share = RELEASED_EMBEDDING / RELEASED_FEATURES
    if keep <= share:
        return max(1, round(keep / share * embedding))
    return embedding + round((keep - share) / (1 - share) * (features - embedding))


def dense_projection(
    rows_RF: np.ndarray,
    dim: int,
    generator: np.random.Generator,
    *,
    batch: int = RELEASED_BATCH,
    modulus: int | None = None,
) -> np.ndarray:
    """Products with a Gaussian matrix over sqrt(dim), (R, D), of the rows as they are read."""
    total_RD = np.zeros((len(rows_RF), dim), rows_RF.dtype)
    for start in range(0, rows_RF.shape[1], BLOCK):
        columns = slice(start, min(start + BLOCK, rows_RF.shape[1]))
        factors_FD = generator.standard_normal((columns.stop - start, dim), dtype=np.float32)
        total_RD += read_rows(rows_RF, columns, batch=batch, modulus=modulus) @ factors_FD
    return total_RD / math.sqrt(dim)


# The rows P x_r of a Gaussian projection depend on the rows x_r through their inner products K = S S^T alone: they are
# distributed as the rows of S Z^T, Z (D, R) Gaussian, and their own inner products as S (Z^T Z / D) S^T. So K is enough
# for any dimension, exactly.


def prefix_grams(rows_RF: np.ndarray, counts: Sequence[int], modulus: int | None = None) -> dict[int, np.ndarray]:
    """Inner products (R, R) of the first `count` columns of the rows as they are read, for each count."""
    edges = sorted({*counts, *range(0, max(counts), BLOCK)})
    total_RR, found = np.zeros((len(rows_RF), len(rows_RF))), {}
    for start, stop in pairwise(edges):
        block = read_rows(rows_RF, slice(start, stop), modulus=modulus)
        total_RR += block @ block.T
        if stop in counts:
            found[stop] = total_RR.copy()
    return found


def root(gram_RR: np.ndarray) -> np.ndarray:
    """S with S S^T = K, for a K of any rank."""
    values, vectors = np.linalg.eigh(gram_RR)
    return vectors * np.sqrt(values.clip(min=0))


def scatters(count: int, dims: Sequence[int], generator: np.random.Generator) -> dict[int, np.ndarray]:
    """Z^T Z / D of a Gaussian Z (D, count) for each dimension, all multiples of the smallest; of a smaller dimension
    the first rows of the same Z."""
    total, found, done = np.zeros((count, count)), {}, 0
    while done < max(dims):
        block = generator.standard_normal((min(dims), count))
        total += block.T @ block
        done += len(block)
        if done in dims:
            found[done] = total / done
    return found
