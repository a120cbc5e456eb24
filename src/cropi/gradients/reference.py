"""The reference estimator: autograd, one prompt at a time. Slow, plain, and the oracle for anything faster."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cropi.functional.advantages import group_advantages
from cropi.functional.surrogate import (
    Normalizer,
    effective_sample_share,
    importance_ratios,
    normalizers,
    token_weights,
)
from cropi.gradients.groups import Group
from cropi.policy import completion_logprobs


@dataclass(frozen=True)
class SurrogateSettings:
    """What the off-policy surrogate of a prompt is made of."""

    normalizer: Normalizer
    max_completion_length: int
    temperature: float = 1.0
    advantage_std: bool = True



@dataclass(frozen=True)
class PromptGradient:
    """The gradient of one prompt's surrogate by parameter name, and the effective sample share of its ratios."""

    gradients: dict[str, Tensor]
    ratio_ess: float


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All trainable parameters by name; a tied weight is counted once, under its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def prompt_gradient(model: nn.Module, group: Group, settings: SurrogateSettings) -> PromptGradient:
    """Off-policy policy gradient of one prompt at the model's current weights.

    g = sum_k (1/Z_k) sum_t A_k grad rho_{k,t}, rho_{k,t} = pi_theta / beta per token (paper eq. 4): the direction in
    which
    the prompt's surrogate grows. No clipping, no KL and no entropy term. Trajectories whose advantage is zero are not
    computed. The model is left as it was found: mode, `requires_grad` and `.grad` stay untouched.
    """
    advantages_K = group_advantages(torch.tensor(group.rewards, dtype=torch.float64), std=settings.advantage_std)
    lengths_K = torch.tensor([len(completion) for completion in group.completions])
    mask_KT = torch.arange(int(lengths_K.max()))[None] < lengths_K[:, None]
    normalizers_K = normalizers(mask_KT, settings.normalizer, settings.max_completion_length)
    parameters = trainable_parameters(model)
    # A sum over micro-batches in bfloat16 would lose the small terms.
    total = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()
    }
    ratios: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        for rows in _micro_batches(group, advantages_K, settings.batch_tokens):
            loss, ratios_T = _weighted_logprob(model, group, rows, advantages_K, normalizers_K, settings)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient
            ratios.append(ratios_T)
    finally:
        model.train(was_training)
    return PromptGradient(total, effective_sample_share(torch.cat(ratios)) if ratios else 1.0)


def _weighted_logprob(
    model: nn.Module,
    group: Group,
    rows: list[int],
    advantages_K: Tensor,
    normalizers_K: Tensor,
    settings: SurrogateSettings,
) -> tuple[Tensor, Tensor]:
    """sum_{k,t} w_{k,t} log pi(x_{k,t}) over some trajectories, and the ratios of their tokens."""
    completions = [group.completions[k] for k in rows]
    logprobs_KT, mask_KT = completion_logprobs(
        model, [group.prompt_ids] * len(rows), completions, temperature=settings.temperature
    )
    if group.behaviour_logprobs is None:
        behaviour_KT = logprobs_KT.detach()
    else:
        behaviour_KT = torch.zeros_like(logprobs_KT)
        for row, k in enumerate(rows):
            stored = torch.tensor(group.behaviour_logprobs[k], dtype=logprobs_KT.dtype)
            behaviour_KT[row, : len(stored)] = stored.to(logprobs_KT.device)
    ratios_KT = importance_ratios(logprobs_KT.detach(), behaviour_KT)
    device = logprobs_KT.device
    weights_KT = token_weights(ratios_KT, advantages_K[rows].to(device), normalizers_K[rows].to(device), mask_KT)
    return (weights_KT.to(logprobs_KT.dtype) * logprobs_KT).sum(), ratios_KT[mask_KT]


def _micro_batches(group: Group, advantages_K: Tensor, batch_tokens: int) -> Iterator[list[int]]:
    """Rows with something to learn from, longest first, in batches of at most `batch_tokens` padded tokens."""
    rows = [k for k in range(len(group.completions)) if advantages_K[k] != 0 and group.completions[k]]
    rows.sort(key=lambda k: -len(group.completions[k]))
    while rows:
        width = len(group.prompt_ids) + len(group.completions[rows[0]])
        count = max(1, batch_tokens // width)
        yield rows[:count]
        rows = rows[count:]
