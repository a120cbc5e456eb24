"""`cropi.influence`: compute the influence of groups on validation sets, in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import nn

from cropi.artifacts import NO_SIGNAL, NON_FINITE, OK
from cropi.errors import SignalError
from cropi.gradients.groups import Group, SurrogateSettings
from cropi.gradients.influence_scorer import BLOCK, Scorer, ScorerOptions, score_by_halves, scorer_of


@dataclass(frozen=True)
class InfluenceScores:
    """Result of `cropi.influence`."""

    values: Float[np.ndarray, "N V"]
    """Influence of each prompt on each validation set, float64, in the order of the arguments; 0 without signal."""
    status: list[str]
    """Per prompt: `ok`, `no_signal` (all rewards equal, or no completion token) or `non_finite`."""
    validation: list[str]
    """Names of the validation sets."""
    ratio_ess: Float[np.ndarray, " N"]
    """Effective share of the tokens after importance weighting, in (0, 1]: 1 on-policy."""
    standard_errors: Float[np.ndarray, "N V"] | None
    """Standard errors of `values` from two halves of each prompt's trajectories, if requested; 0 without signal. Each
    has one degree of freedom: average squares over prompts."""
    tokens_given: int
    """Tokens of all training trajectories, with the prompt counted for each."""
    tokens_computed: int
    """Tokens that went through the policy for the training prompts."""


def influence(
    policy: nn.Module,
    train: Sequence[Group],
    validation: Mapping[str, Sequence[Group]],
    *,
    surrogate: SurrogateSettings = SurrogateSettings(),  # noqa: B008 - frozen
    options: ScorerOptions = ScorerOptions(),  # noqa: B008 - frozen
    standard_errors: bool = False,
) -> InfluenceScores:
    """Compute the influence of every training prompt on every validation set at the policy's current weights.

    Inf_v(i) = <g_i, (1/M) sum_m g_m> with g the gradient of a prompt's off-policy surrogate
    sum_k (1/Z_k) sum_t rho_{k,t} A_k (paper eq. 4 and its definition of influence): to first order, what a step along
    g_i adds to the validation objective. With the score `cosine` it is divided by both lengths, as in the paper's
    experiments; `gain` multiplies that by the standard deviation of the prompt's rewards.

    policy: a transformers causal LM, or a PEFT model around one; gradients are those of its trainable parameters.
    train, validation: groups of trajectories; the validation sets' order is the mapping's.
    surrogate: normaliser and scaling of the advantages, and the temperature that the trajectories were sampled with.
    options: estimator, score, and details of the computation.
    standard_errors: also estimate the error of each value; computes each prompt twice.

    A group without signal, or with numbers that are not finite, gets 0 and a status, and does not affect others.
    Where the engine does not cover an architecture, a warning says so, and autograd computes the same more slowly.
    Raises SignalError if a validation set has no group with signal or a direction that is not finite, and PolicyError
    for what is no causal language model.
    """
    scorer = scorer_of(policy, surrogate, options)
    _require_signal(validation)
    scorer.aim(validation)
    return _scored(scorer, train, list(validation), standard_errors)


def _require_signal(validation: Mapping[str, Sequence[Group]]) -> None:
    for name, groups in validation.items():
        if not any(group.status == OK for group in groups):
            raise SignalError(
                "none of its groups has both better and worse completions, so it has no direction",
                where=f"validation set {name}",
                fix="use problems that the policy solves sometimes, or more completions for each.",
            )


def _scored(scorer: Scorer, train: Sequence[Group], validation: list[str], standard_errors: bool) -> InfluenceScores:
    """Score block by block, which limits the features in memory."""
    values, errors, tokens = [], [], 0
    shares = list[float]()
    for start in range(0, len(train), BLOCK):
        block = train[start : start + BLOCK]
        scored = score_by_halves(scorer, block) if standard_errors else scorer(block)
        values.append(scorer.values(scored))
        shares += [one.effective_share for one in scored.ratios]
        if scored.errors_NV is not None:
            errors.append(scored.errors_NV)
        tokens += scored.tokens_computed
    values_NV = np.concatenate(values) if values else np.zeros((0, len(validation)))
    status = statuses(train, values_NV)
    finite_N1 = np.isfinite(values_NV).all(axis=1, keepdims=True)
    errors_NV = np.concatenate(errors) if errors else np.zeros(values_NV.shape)
    return InfluenceScores(
        values=np.where(finite_N1, values_NV, 0.0),
        status=status,
        validation=validation,
        ratio_ess=np.array(shares, dtype=np.float64),
        standard_errors=np.where(finite_N1, errors_NV, 0.0) if standard_errors else None,
        tokens_given=sum(len(g.prompt_ids) * len(g.completions) + g.completion_tokens for g in train),
        tokens_computed=tokens,
    )


def statuses(groups: Sequence[Group], values_NV: Float[np.ndarray, "N V"]) -> list[str]:
    """Return the status of each group, given its influence."""
    finite_N = np.isfinite(values_NV).all(axis=1)
    return [
        NO_SIGNAL if group.status != OK else OK if finite else NON_FINITE
        for group, finite in zip(groups, finite_N, strict=True)
    ]
