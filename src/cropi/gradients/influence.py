"""`cropi.influence`: influence of groups on validation sets, in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from torch import nn

from cropi.artifacts import NO_SIGNAL, NON_FINITE, OK
from cropi.errors import SignalError
from cropi.functional.projection import SparseProjection
from cropi.functional.surrogate import Normalizer
from cropi.gradients.groups import Group
from cropi.gradients.scorer import BLOCK, Estimator, Score, Scorer
from cropi.gradients.surrogate import SurrogateSettings


@dataclass(frozen=True)
class InfluenceScores:
    """The result of `cropi.influence`."""

    values: Float[np.ndarray, "N V"]
    """Influence of each prompt on each validation set, float64, in the orders given; 0 where there is no signal."""
    status: list[str]
    """Per prompt: `ok`, `no_signal` (all rewards equal, or no completion token), `non_finite` (its own numbers)."""
    validation: list[str]
    """Names of the validation sets."""
    ratio_ess: Float[np.ndarray, " N"]
    """Effective share of the tokens after importance weighting, in (0, 1]: 1 on-policy."""
    standard_errors: Float[np.ndarray, "N V"] | None
    """Of `values`, from the spread of each prompt's trajectories (jackknife), if asked for; 0 without signal, NaN for
    fewer than three trajectories."""
    tokens_given: int
    """Tokens of all training trajectories, prompts counted for each."""
    tokens_computed: int
    """Tokens that went through the policy for the training prompts."""


def influence(
    policy: nn.Module,
    train: Sequence[Group],
    validation: Mapping[str, Sequence[Group]],
    *,
    estimator: Estimator = "sketch",
    normalizer: Normalizer = "sequence",
    score: Score = "dot",
    advantage_std: bool = True,
    max_completion_length: int | None = None,
    temperature: float = 1.0,
    validation_mean: Literal["plain", "normalized"] = "plain",
    projection: SparseProjection | None = None,
    standard_errors: bool = False,
    batch_tokens: int | None = None,
) -> InfluenceScores:
    """Influence of every training prompt on every validation set at the policy's current weights.

    Inf_v(i) = <g_i, (1/M) sum_m g_m> with g the gradient of a prompt's off-policy surrogate
    sum_k (1/Z_k) sum_t rho_{k,t} A_k (paper eq. 4 and its definition of influence): to first order, what a step along
    g_i adds to the validation objective. `score="cosine"` divides by both lengths, as the paper's experiments do;
    `score="gain"` multiplies that by the standard deviation of the prompt's rewards.

    policy: a transformers causal LM, or a PEFT model around one; gradients are those of its trainable parameters.
    train, validation: groups of trajectories; the validation sets' order is the mapping's.
    estimator: `sketch` (about 2 forward passes of work per token), `exact` (no projection), `reference` (autograd).
    normalizer: Z_k, see `cropi.functional.surrogate.normalizers`; `constant` needs `max_completion_length`.
    advantage_std: divide advantages by the group's standard deviation (GRPO) or not (Dr. GRPO).
    temperature: the one that the trajectories were sampled with.
    standard_errors: also give each value's; prompts are then not shared by their trajectories, which costs their tokens
        K times. Not for `reference`, nor for `exact` with cosine or gain.
    batch_tokens: tokens of a forward pass; by default what memory allows.

    A group without signal, or whose own numbers are not finite, gets 0 and a status, and changes nothing for others.
    Raises SignalError where a validation set has no group with signal or a direction that is not finite, ValueError for
    `constant` without a length, PolicyError for an architecture that the engine does not cover.
    """
    if normalizer == "constant" and max_completion_length is None:
        raise ValueError("normalizer='constant' needs max_completion_length, in tokens")
    if standard_errors and (estimator == "reference" or (estimator == "exact" and score != "dot")):
        raise ValueError("standard_errors needs estimator='sketch', or 'exact' with score='dot'")
    settings = SurrogateSettings(normalizer, max_completion_length or 1, temperature, advantage_std)
    scorer = Scorer(
        policy,
        settings,
        estimator=estimator,
        score=score,
        validation_mean=validation_mean,
        projection=projection,
        batch_tokens=batch_tokens,
    )
    _require_signal(validation)
    scorer.aim(validation)
    return _scored(scorer, train, list(validation), standard_errors)


def _require_signal(validation: Mapping[str, Sequence[Group]]) -> None:
    for name, groups in validation.items():
        if not any(group.status == OK for group in groups):
            raise SignalError(
                "no group of it has both better and worse completions, so it gives no direction",
                where=f"validation set {name}",
                fix="use problems that the policy solves sometimes, or more completions for each.",
            )


def _scored(scorer: Scorer, train: Sequence[Group], validation: list[str], standard_errors: bool) -> InfluenceScores:
    """Block by block, so that no more features are in memory at once."""
    values, shares, errors, tokens = [], [], [], 0
    for start in range(0, len(train), BLOCK):
        scored = scorer(train[start : start + BLOCK], standard_errors=standard_errors)
        values.append(scorer.values(scored))
        shares.append(scored.ratio_facts_NR[:, 0])
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
        ratio_ess=np.concatenate(shares) if shares else np.zeros(0),
        standard_errors=np.where(finite_N1, errors_NV, 0.0) if standard_errors else None,
        tokens_given=sum(len(g.prompt_ids) * len(g.completions) + g.completion_tokens for g in train),
        tokens_computed=tokens,
    )


def statuses(groups: Sequence[Group], values_NV: Float[np.ndarray, "N V"]) -> list[str]:
    """Status of each group, given its influence."""
    finite_N = np.isfinite(values_NV).all(axis=1)
    return [
        NO_SIGNAL if group.status != OK else OK if finite else NON_FINITE
        for group, finite in zip(groups, finite_N, strict=True)
    ]
