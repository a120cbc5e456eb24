"""The reference estimator: autograd, one prompt at a time. Slow and simple; the oracle for the fast estimators."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cropi.functional.surrogate import token_weights
from cropi.gradients.groups import Group, RatioStatistics, SurrogateSettings, ratio_statistics, trajectory_scales
from cropi.gradients.packing import Span
from cropi.policy import completion_logprobs, evaluating


@dataclass(frozen=True)
class PromptGradient:
    """Gradient of one prompt's surrogate by parameter name, and its ratio statistics."""

    gradients: dict[str, Tensor]
    ratios: RatioStatistics


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All trainable parameters by name; a tied weight is counted once, under its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def prompt_gradient(
    model: nn.Module,
    group: Group,
    settings: SurrogateSettings,
    *,
    batch_tokens: int = 8192,
    factors: Sequence[float] | None = None,
) -> PromptGradient:
    """Compute the off-policy policy gradient of one prompt at the model's current weights.

    g = sum_k (1/Z_k) sum_t A_k grad rho_{k,t}, rho_{k,t} = pi_theta / beta per token (paper eq. 4): the direction in
    which the prompt's surrogate grows, without KL or entropy terms. Trajectories with zero advantage are skipped. Rows
    of one length go together, at most `batch_tokens` tokens. `factors` multiply the trajectories' weights. The model's
    mode, `requires_grad` and `.grad` stay as they are.
    """
    parameters = trainable_parameters(model)
    # A sum over micro-batches in bfloat16 would lose the small terms.
    total = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()
    }
    ratios = RatioStatistics()
    scales_K = torch.tensor(trajectory_scales(group, settings), dtype=torch.float64)
    if factors is not None:
        scales_K = scales_K * torch.tensor(factors, dtype=torch.float64)
    with evaluating(model):
        for rows in _micro_batches(group, scales_K, batch_tokens):
            loss, log_ratios_T = _weighted_logprob(model, group, rows, scales_K, settings)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient
            ratios += ratio_statistics(log_ratios_T, [Span(0, 0, len(log_ratios_T))])[0]
    return PromptGradient(total, ratios)


def _weighted_logprob(
    model: nn.Module, group: Group, rows: list[int], scales_K: Tensor, settings: SurrogateSettings
) -> tuple[Tensor, Tensor]:
    """sum_{k,t} w_{k,t} log pi(x_{k,t}) over some trajectories, and the log importance ratios of their tokens."""
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
    log_ratios_KT = (logprobs_KT.detach() - behaviour_KT).double()
    weights_KT = token_weights(log_ratios_KT.exp(), scales_K[rows].to(logprobs_KT.device), mask_KT)
    return (weights_KT.to(logprobs_KT.dtype) * logprobs_KT).sum(), log_ratios_KT[mask_KT]


def _micro_batches(group: Group, scales_K: Tensor, batch_tokens: int) -> Iterator[list[int]]:
    """Rows with a non-zero scale, longest first, in batches of one length and at most `batch_tokens` tokens.

    No row is padded: rotary positions of some models depend on the longest row, and expert choices on all tokens.
    """
    lengths = [len(completion) for completion in group.completions]
    for length in sorted(set(lengths) - {0}, reverse=True):
        rows = [k for k, own in enumerate(lengths) if own == length and scales_K[k] != 0]
        count = max(1, batch_tokens // (len(group.prompt_ids) + length))
        for start in range(0, len(rows), count):
            yield rows[start : start + count]
