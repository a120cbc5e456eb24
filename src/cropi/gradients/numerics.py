"""Products and sums that keep float32 or better whatever the policy's dtype."""

from collections.abc import Mapping

import torch
from torch import Tensor

AT_ONCE = 1 << 27
"""Numbers that are copied in float64: 1 GiB."""


def widened(tensor: Tensor) -> Tensor:
    """In float32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def outer_sum(grads_TO: Tensor, inputs_TI: Tensor) -> Tensor:
    """sum_t grads[t] inputs[t]^T, (O, I), summed and given in float32 or wider.

    On CUDA, 16-bit factors stay as they are, so that tensor cores can take them.
    """
    if grads_TO.is_cuda and grads_TO.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(grads_TO.T, inputs_TI.to(grads_TO.dtype), out_dtype=torch.float32)
    inputs_TI = widened(inputs_TI)
    return grads_TO.to(inputs_TI.dtype).T @ inputs_TI


def add_outer_sum(total_WO: Tensor, left_TW: Tensor, right_TO: Tensor) -> None:
    """Add sum_t left[t] right[t]^T, taken as in `outer_sum`, to (W, O) numbers of float32 or wider."""
    if right_TO.is_cuda and right_TO.dtype in (torch.bfloat16, torch.float16):
        total_WO += outer_sum(left_TW.to(right_TO.dtype), right_TO)
    else:
        total_WO.addmm_(left_TW.to(total_WO.dtype).T, right_TO.to(total_WO.dtype))


def inner(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Inner product of two gradients by parameter name, in float64."""
    total = 0.0
    for name in first:
        parts = (gradients[name].reshape(-1).split(AT_ONCE) for gradients in (first, second))
        total += sum((one.double() * other.double()).sum() for one, other in zip(*parts, strict=True))
    return float(total)


def norm(gradients: Mapping[str, Tensor]) -> float:
    """Length of a gradient by parameter name, in float64."""
    return inner(gradients, gradients) ** 0.5
