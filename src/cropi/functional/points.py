"""Prompts as points: TF-IDF vectors of words, principal directions of representations, cosines and distances."""

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

BLOCK = 8192  # rows at a time


def tfidf_similarity(
    texts: Sequence[Sequence[str]], sets: Mapping[str, Sequence[Sequence[str]]]
) -> dict[str, Float[np.ndarray, " N"]]:
    """Similarity in [0, 1] of N texts to each set of texts; a text is a sequence of words.

    x_w = n_w (1 + ln((1 + D) / (1 + D_w))): w occurs n_w times in the text, and in D_w of all D texts, sets
    included (Salton & Buckley 1988, with the smoothing that scikit-learn has by default). Of the cosines of x with the
    texts of a set the largest counts. A text without a word has similarity 0.

    Memory: one float64 for each text of a set and each word of the sets.
    """
    vectors = _vectors([*texts, *(text for members in sets.values() for text in members)])
    of_texts, rest = vectors[: len(texts)], vectors[len(texts) :]
    found = {}
    for name, members in sets.items():
        own, rest = rest[: len(members)], rest[len(members) :]
        column_of = {word: column for column, word in enumerate(sorted({word for vector in own for word in vector}))}
        matrix_MW = np.zeros((len(own), len(column_of)))
        for row, vector in enumerate(own):
            matrix_MW[row, [column_of[word] for word in vector]] = list(vector.values())
        found[name] = np.array([_largest(vector, matrix_MW, column_of) for vector in of_texts], dtype=np.float64)
    return found


def tfidf_points(texts: Sequence[Sequence[str]], dimensions: int = 256) -> Float[np.ndarray, "N {dimensions}"]:
    """TF-IDF vectors of N texts with words hashed into a few dimensions, each with a sign (Weinberger et al. 2009).

    Inner products are the cosines on average over hashes.
    """
    points_ND = np.zeros((len(texts), dimensions), dtype=np.float32)
    for row, vector in enumerate(_vectors(texts)):
        for word, value in vector.items():
            hashed = zlib.crc32(word.encode())
            points_ND[row, (hashed >> 1) % dimensions] += value if hashed % 2 else -value
    return points_ND


def _vectors(texts: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """Vectors of length 1 by word."""
    everything = [Counter(text) for text in texts]
    holding = Counter(word for counts in everything for word in counts)
    weight_of = {word: 1 + np.log((1 + len(everything)) / (1 + count)) for word, count in holding.items()}
    return [_unit(counts, weight_of) for counts in everything]


def _unit(counts: Mapping[str, int], weight_of: Mapping[str, float]) -> dict[str, float]:
    vector = {word: count * weight_of[word] for word, count in counts.items()}
    length = float(np.sqrt(sum(value**2 for value in vector.values())))
    return {word: value / length for word, value in vector.items()}


def _largest(vector: Mapping[str, float], matrix_MW: Float[np.ndarray, "M W"], column_of: Mapping[str, int]) -> float:
    known = [(column_of[word], value) for word, value in vector.items() if word in column_of]
    if not known:
        return 0.0
    columns, values = zip(*known, strict=True)
    return float((matrix_MW[:, list(columns)] @ np.array(values)).max())


def principal_points(*parts: Float[np.ndarray, "_ E"], dimensions: int = 32) -> Float[np.ndarray, "N dimensions"]:
    """Coordinates of the rows of all parts along their first principal directions, scaled to a mean square length of 1.

    Returns fewer directions if there are fewer, and zeros if all rows are equal. Rows are widened to float64 and
    centred in blocks, since all of them may fill most of the memory.
    """
    rows = [part[start : start + BLOCK] for part in parts for start in range(0, len(part), BLOCK)]
    count = sum(map(len, rows))
    mean_E = sum(block.sum(axis=0, dtype=np.float64) for block in rows) / count
    covariance_EE = sum((centred := block - mean_E).T @ centred for block in rows) / count
    values_E, directions_EE = np.linalg.eigh(covariance_EE)
    kept = np.argsort(-values_E)[:dimensions]
    points = np.concatenate([(block - mean_E) @ directions_EE[:, kept] for block in rows])
    scale = float(np.sqrt((points**2).sum(axis=1).mean()))
    return points / scale if scale > 0 else points


def unit_rows(rows_RE: Float[np.ndarray, "R E"]) -> Float[np.ndarray, "R E"]:
    """Rows scaled to length 1; rows of zeros stay."""
    found: np.ndarray = rows_RE / np.maximum(np.linalg.norm(rows_RE, axis=1, keepdims=True), 1e-12)
    return found


def nearest_cosines(
    points_NE: Float[np.ndarray, "N E"], others_ME: Float[np.ndarray, "M E"]
) -> Float[np.ndarray, " N"]:
    """Cosine of each point with the nearest of others."""
    unit_ME = unit_rows(others_ME)
    blocks = (points_NE[start : start + BLOCK] for start in range(0, len(points_NE), BLOCK))
    return np.concatenate([(unit_rows(block) @ unit_ME.T).max(axis=1) for block in blocks])


def squared_distances(first: Float[np.ndarray, "A E"], second: Float[np.ndarray, "B E"]) -> Float[np.ndarray, "A B"]:
    """Squared distances of each point to each of others."""
    products = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2 * first @ second.T
    found: np.ndarray = np.maximum(products, 0.0)
    return found
