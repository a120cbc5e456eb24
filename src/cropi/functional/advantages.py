"""Group-relative advantages. NumPy only."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

EPSILON = 1e-4


def group_advantages(rewards_XK: Float[np.ndarray, "*X K"], *, std: bool = True) -> Float[np.ndarray, "*X K"]:
    """Advantage of each trajectory of one prompt against its group; leading dimensions are groups.

    A_k = (r_k - mean(r)) / (s + 1e-4), with s the standard deviation with Bessel's correction (GRPO, arXiv 2402.03300,
    eq. 21; the constant is TRL's). `std=False` gives A_k = r_k - mean(r) (Dr. GRPO, arXiv 2503.20783).

    Equal rewards give exactly 0. Raises ValueError for fewer than two rewards, which have no deviation.
    """
    rewards_XK = np.asarray(rewards_XK, dtype=np.float64)
    count = rewards_XK.shape[-1]
    if count < 2:
        raise ValueError(f"a group needs at least 2 rewards, got {count}")
    share = 1 / count
    with np.errstate(invalid="ignore"):  # infinite rewards give NaN, which is handled later
        centred_XK = rewards_XK - (share * rewards_XK).sum(axis=-1, keepdims=True)
    # The mean of equal floats may differ from them by a rounding error, which 1/1e-4 would blow up.
    equal_X1 = (rewards_XK == rewards_XK[..., :1]).all(axis=-1, keepdims=True)
    centred_XK = np.where(equal_X1, 0.0, centred_XK)
    if not std:
        return centred_XK
    variance_X1 = count / (count - 1) * (share * centred_XK**2).sum(axis=-1, keepdims=True)
    return centred_XK / (np.sqrt(variance_X1) + EPSILON)
