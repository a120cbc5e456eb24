"""The off-policy surrogate of one prompt: group advantages, and weights on the log-probs of its tokens."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Normalizer = Literal["sequence", "token", "constant"]

EPSILON = 1e-4  # added to the deviation of the rewards

# The per-prompt normaliser with which prompts rank as in the trainer's loss. A divisor shared by all prompts of a batch
# (`dapo`, `bnpo`, `cispo`: the batch's token count) does not change the ranking, so it counts as a constant.
NORMALIZER_OF_LOSS: Mapping[str, Normalizer] = {
    "grpo": "sequence",
    "sapo": "sequence",
    "dr_grpo": "constant",
    "dapo": "constant",
    "bnpo": "constant",
    "cispo": "constant",
    "vespo": "constant",
    "luspo": "constant",
}


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


def token_logprobs(
    logits_KTW: Float[Tensor, "K T W"], ids_KT: torch.Tensor, *, temperature: float
) -> Float[Tensor, "K T"]:
    """log pi(x_t | s_t) at a sampling temperature: log_softmax(logits / temperature), in at least float32, at x_t."""
    dtype = torch.promote_types(logits_KTW.dtype, torch.float32)
    return torch.log_softmax(logits_KTW.to(dtype) / temperature, dim=-1).gather(-1, ids_KT.unsqueeze(-1)).squeeze(-1)


def normalizers(
    lengths_XK: Int[np.ndarray, "*X K"], normalizer: Normalizer, max_completion_length: int
) -> Float[np.ndarray, "*X K"]:
    """Z of each trajectory, so that the surrogate is sum_k (1 / Z_k) sum_t rho_{k,t} A_k; from completion lengths.

    `sequence`: K |tau_k| (paper eq. 4, TRL's `grpo`); `token`: sum_k |tau_k|; `constant`: K times the longest
    completion allowed (TRL's `dr_grpo`). An empty completion gets Z = 1 instead of 0.
    """
    lengths_XK = np.asarray(lengths_XK, dtype=np.float64)
    count = lengths_XK.shape[-1]
    match normalizer:
        case "sequence":
            return count * np.maximum(lengths_XK, 1.0)
        case "token":
            return np.broadcast_to(np.maximum(lengths_XK.sum(axis=-1, keepdims=True), 1.0), lengths_XK.shape)
        case "constant":
            return np.full(lengths_XK.shape, float(count * max_completion_length))


def token_weights(
    ratios_KT: Float[Tensor, "K T"], scales_K: Float[Tensor, " K"], mask_KT: Bool[Tensor, "K T"]
) -> Float[Tensor, "K T"]:
    """w_{k,t} = rho_{k,t} A_k / Z_k on completion tokens, 0 elsewhere, without gradient; `scales_K` are A_k / Z_k.

    rho_{k,t} = pi_theta(x_t | s_t) / beta(x_t | s_t), per token and without clipping.
    Since grad rho = rho grad log pi, the gradient of sum_{k,t} w_{k,t} log pi(x_{k,t}) equals that of the surrogate
    sum_k (1/Z_k) sum_t rho_{k,t} A_k: the off-policy estimate of paper eq. 4, from one backward pass.
    """
    weights_KT = ratios_KT.detach().double() * scales_K.double().unsqueeze(1)
    return torch.where(mask_KT, weights_KT, torch.zeros_like(weights_KT))
