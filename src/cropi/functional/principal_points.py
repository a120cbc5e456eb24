"""Coordinates of representations along their principal directions. NumPy only."""

import numpy as np
from jaxtyping import Float

ROWS = 8192  # widened at once


def principal_points(*parts: Float[np.ndarray, "_ E"], dimensions: int = 32) -> Float[np.ndarray, "N dimensions"]:
    """Coordinates of the rows of all parts along their first principal directions, scaled to a mean square length of 1.

    Returns fewer directions if there are fewer, and zeros if all rows are equal. Rows are widened to float64 and
    centred in blocks, since all of them may fill most of the memory.
    """
    rows = [part[start : start + ROWS] for part in parts for start in range(0, len(part), ROWS)]
    count = sum(map(len, rows))
    mean_E = sum(block.sum(axis=0, dtype=np.float64) for block in rows) / count
    covariance_EE = sum((centred := block - mean_E).T @ centred for block in rows) / count
    values_E, directions_EE = np.linalg.eigh(covariance_EE)
    kept = np.argsort(-values_E)[:dimensions]
    points = np.concatenate([(block - mean_E) @ directions_EE[:, kept] for block in rows])
    scale = float(np.sqrt((points**2).sum(axis=1).mean()))
    return points / scale if scale > 0 else points
