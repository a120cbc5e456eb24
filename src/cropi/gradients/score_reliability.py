"""Reliability of scores: standard errors from two halves of each group, stability of the ranking, policy drift."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cropi.artifacts import OK
from cropi.config import Config
from cropi.functional.influence_formulas import influence
from cropi.functional.ranking import (
    ranks,
    reciprocal_rank_fusion,
    reliability,
    selection_size,
    shrunk,
    top_probabilities,
)
from cropi.gradients.groups import RATIO_COLUMNS, Group
from cropi.gradients.influence_scorer import Scored, Scorer
from cropi.seeds import derived_seed

# Beyond any of these, a stage's scores depend more on old trajectories than on the policy.
LOW_ESS = 0.5  # half of the sample lost: where sequential Monte Carlo resamples (Liu & Chen 1995)
HIGH_CLIP_SHARE = 0.3  # PPO would take no step on so many tokens; training runs stay near 0.1 to 0.2
HIGH_KL = 0.1  # nats a token: 10 nats over a hundred tokens, completions that the policy would hardly write


def half_factors(rewards: Sequence[float]) -> tuple[list[float], list[float]]:
    """Divide the trajectories of a group in two halves of similar rewards; return factors 0 and 1 of each half.

    Every other trajectory, in descending order of reward, goes to the first half.
    """
    order = sorted(range(len(rewards)), key=lambda k: (-rewards[k], k))
    first = [0.0] * len(rewards)
    for k in order[::2]:
        first[k] = 1.0
    return first, [1 - factor for factor in first]


def score_by_halves(scorer: Scorer, groups: Sequence[Group], advance: Callable[[int], None] | None = None) -> Scored:
    """Score groups with standard errors from two halves of each group's trajectories.

    The influence is s = s_1 + s_2, the contributions of the halves, and the error is |s_1 - s_2|. If the halves are
    exchangeable given the rewards, the expectation of its square is the variance of s. An error has one degree of
    freedom, so average squares over prompts. For `cosine` and `gain`, the error of the gradient's length is left out.

    A prompt is computed once per half, so its tokens count twice.
    """
    if scorer.estimator != "sketch":
        return _by_first_half(scorer, groups, advance)
    doubled = [group for group in groups for _ in range(2)]
    factors = [half for group in groups for half in half_factors(group.rewards)]
    scored = scorer(doubled, factors=factors)
    assert scored.features_ND is not None
    products_NHV = scored.products_NV.reshape(len(groups), 2, scored.products_NV.shape[1])
    features_ND = scored.features_ND.reshape(len(groups), 2, scored.features_ND.shape[1]).sum(dim=1)
    pairs = zip(scored.ratios[::2], scored.ratios[1::2], strict=True)
    columns_NR = np.array([(first + second).columns for first, second in pairs])
    if advance is not None:
        advance(len(groups))
    norms_N = features_ND.double().norm(dim=1).numpy()
    variances_N = np.array([group.variance for group in groups], dtype=np.float64)
    with np.errstate(invalid="ignore"):  # infinite products give NaN, which the status reports
        sums_NV, differences_NV = products_NHV.sum(axis=1), np.abs(products_NHV[:, 0] - products_NHV[:, 1])
    return replace(
        scored,
        products_NV=sums_NV,
        norms_N=norms_N,
        ratio_columns_NR=columns_NR.reshape(len(groups), len(RATIO_COLUMNS)),
        features_ND=features_ND,
        ratios=(),
        variances_N=variances_N,
        errors_NV=influence(differences_NV, norms_N, scorer.norms_V, scorer.score, variances_N),
    )


def _by_first_half(scorer: Scorer, groups: Sequence[Group], advance: Callable[[int], None] | None) -> Scored:
    """`score_by_halves` without features that would give the norm of a sum: the groups whole, then their first halves,
    and s_1 - s_2 = 2 s_1 - s."""
    whole = scorer(groups, advance=advance)
    first = scorer(groups, factors=[half_factors(group.rewards)[0] for group in groups])
    with np.errstate(invalid="ignore"):
        differences_NV = np.abs(2 * first.products_NV - whole.products_NV)
    return replace(
        whole,
        tokens_computed=whole.tokens_computed + first.tokens_computed,
        errors_NV=influence(differences_NV, whole.norms_N, scorer.norms_V, scorer.score, whole.variances_N),
    )


def add_reliability(
    config: Config, rows: Mapping[str, dict[str, Any]], names: list[str], stage: int
) -> dict[str, Any] | None:
    """Enter every prompt's probability of being among the best, and summarise how reliable the ranking is.

    Per validation set: `reliability` of the influence. Over all sets: `expected_overlap`, the share of the top-ranked
    prompts that is expected to belong there, and the share that `chance` would give.
    """
    ok = [row for row in rows.values() if row["status"] == OK]
    if not ok:
        return None
    settings, size = config.select, selection_size(config.select.fraction, len(rows))
    estimates = {name: np.array([row[f"influence/{name}"] for row in ok]) for name in names}
    errors = {name: np.array([row[f"standard_error/{name}"] for row in ok], dtype=np.float64) for name in names}
    # A single error has one degree of freedom, so all prompts share the mean square.
    shared = {name: np.full(len(ok), np.sqrt(np.mean(errors[name] ** 2))) for name in names}
    depth = size if settings.fusion.truncate else None
    chances_N = top_probabilities(
        [shrunk(estimates[name], shared[name]) for name in names],
        size,
        kappa=settings.fusion.kappa,
        depth=depth,
        seed=derived_seed(config.seed, "reliability", stage),
    )
    for row in rows.values():
        row["top_probability"] = 0.0
    for row, chance in zip(ok, chances_N.tolist(), strict=True):
        row["top_probability"] = chance
    ranks_NV = np.stack([ranks(estimates[name], [row["prompt_id"] for row in ok]) for name in names], axis=1)
    best = np.argsort(-reciprocal_rank_fusion(ranks_NV, kappa=settings.fusion.kappa, depth=depth), kind="stable")[:size]
    return {
        "reliability": {name: reliability(estimates[name], errors[name]) for name in names},
        "expected_overlap": float(chances_N[best].mean()),
        "chance": min(1.0, size / len(ok)),
    }


def policy_drift(rows: Iterable[Mapping[str, Any]]) -> dict[str, float] | None:
    """Summarise how far the policy is from the one that sampled; None if no prompt has ratio statistics.

    The median over prompts with signal of the effective sample share, and the means of the clip share and of the
    divergence per token.
    """
    known = [row for row in rows if None not in (row["ratio_ess"], row["clip_share"], row["kl"])]
    if not known:
        return None
    return {
        "ratio_ess": float(np.median([row["ratio_ess"] for row in known])),
        "clip_share": float(np.mean([row["clip_share"] for row in known])),
        "kl": float(np.mean([row["kl"] for row in known])),
    }


def drift_warning(drift: Mapping[str, float] | None, stage: int) -> str | None:
    """Return a warning if the stored trajectories are too old for a stage, else None. `drift`: see `policy_drift`."""
    if drift is None:
        return None
    found = []
    if drift["ratio_ess"] < LOW_ESS:
        found.append(f"the median prompt keeps {drift['ratio_ess']:.0%} of its effective sample size (ratio_ess)")
    if drift["clip_share"] > HIGH_CLIP_SHARE:
        found.append(f"{drift['clip_share']:.0%} of the importance ratios are outside the clip range")
    if drift["kl"] > HIGH_KL:
        found.append(f"the divergence is {drift['kl']:.2f} nats a token")
    if not found:
        return None
    return (
        f"stage {stage}: the policy has moved far from the one that sampled the trajectories, so influence is noisy or "
        f"biased: {'; '.join(found)}. Train fewer steps, or begin anew from the present policy."
    )
