"""Group-relative advantages."""

from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-4


def group_advantages(rewards_K: Float[Tensor, " K"], *, std: bool = True) -> Float[Tensor, " K"]:
    """Advantage of each trajectory of one prompt against its group.

    A_k = (r_k - mean(r)) / (s + 1e-4), with s the standard deviation with Bessel's correction (GRPO, arXiv 2402.03300,
    eq. 21; the constant is TRL's). `std=False` gives A_k = r_k - mean(r) (Dr. GRPO, arXiv 2503.20783).
    Equal rewards give exactly 0. Raises ValueError for fewer than two rewards, whose deviation does not exist.
    """
    if rewards_K.numel() < 2:
        raise ValueError(f"a group needs at least 2 rewards, got {rewards_K.numel()}")
    if bool((rewards_K == rewards_K[0]).all()):
        # The mean of equal floats may differ from them by a rounding error, which 1/1e-4 would blow up.
        return rewards_K.new_zeros(rewards_K.shape)
    centred_K = rewards_K - rewards_K.mean()
    return centred_K / (rewards_K.std(unbiased=True) + EPSILON) if std else centred_K
