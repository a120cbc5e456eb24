"""The prefix correction: weigh each token by the product of the importance ratios up to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cropi.gradients.groups import Group
from cropi.policy import completion_logprobs

CAP = 10.0
"""Largest product of ratios."""


def log_prefix_ratios(log_ratios_T: Float[Tensor, " T"], cap: float = CAP) -> Float[Tensor, " T"]:
    """log min(rho_1 ... rho_t, cap) of one trajectory, from its log rho_t in order.

    The product is the probability ratio of the whole prefix. Without the cap, and with a baseline that does not depend
    on the trajectory, only the outcome's dependence on later tokens stays uncorrected.
    """
    return log_ratios_T.cumsum(0).clamp(max=math.log(cap))


@torch.no_grad()
def prefix_corrected(model: nn.Module, groups: Sequence[Group], temperature: float, cap: float = CAP) -> list[Group]:
    """Replace behaviour log-probs so that the token ratios at this policy become the prefix products. On-policy groups
    stay as they are."""
    return [_corrected(model, group, temperature, cap) for group in groups]


def _corrected(model: nn.Module, group: Group, temperature: float, cap: float) -> Group:
    if group.behaviour_logprobs is None:
        return group
    corrected: list[list[float]] = []
    for completion, stored in zip(group.completions, group.behaviour_logprobs, strict=True):
        if not completion:
            corrected.append([])
            continue
        found_KT, _ = completion_logprobs(model, [group.prompt_ids], [completion], temperature=temperature)
        current_T = found_KT[0].double().cpu()
        log_ratios_T = current_T - torch.tensor(stored, dtype=torch.float64)
        corrected.append((current_T - log_prefix_ratios(log_ratios_T, cap)).tolist())
    return replace(group, behaviour_logprobs=corrected)
