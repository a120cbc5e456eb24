"""Errors from two halves of each group: cheaper than the jackknife, and enough where many prompts are pooled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from cropi.gradients.groups import Group
from cropi.gradients.ratios import FACTS
from cropi.gradients.scorer import BLOCK, Scored, Scorer


def halves(rewards: Sequence[float]) -> tuple[list[float], list[float]]:
    """Factors 0 and 1 that divide the trajectories of a group in two, rewards as evenly as can be: in descending order
    of reward, every other one."""
    order = sorted(range(len(rewards)), key=lambda k: (-rewards[k], k))
    first = [0.0] * len(rewards)
    for k in order[::2]:
        first[k] = 1.0
    return first, [1 - factor for factor in first]


def score_by_halves(scorer: Scorer, groups: Sequence[Group], advance: Callable[[int], None] | None = None) -> Scored:
    """What `Scorer` says of some groups, with errors from s = s_1 + s_2, the parts of the influence that two halves of
    the trajectories make up: |s_1 - s_2|, whose square has the variance of s as its expectation where the halves are
    exchangeable, given the rewards. One degree of freedom each: to be averaged over prompts.

    A prompt is shared within a half, so its tokens count twice rather than K times. For `dot`; `sketch` alone, which
    has the features of both halves and so the length of their sum.
    """
    if scorer.estimator != "sketch":
        raise ValueError("halves need estimator='sketch'")
    return joined([_block(scorer, groups[at : at + BLOCK], advance) for at in range(0, len(groups), BLOCK)])


def joined(parts: Sequence[Scored]) -> Scored:
    """What is known of several lots of groups as of one, without their features."""
    return Scored(
        np.concatenate([part.products_NV for part in parts]),
        np.concatenate([part.norms_N for part in parts]),
        np.concatenate([part.ratio_facts_NR for part in parts]),
        None,
        sum(part.tokens_computed for part in parts),
        np.concatenate([part.errors_NV for part in parts if part.errors_NV is not None]),
        np.concatenate([part.variances_N for part in parts if part.variances_N is not None]),
    )


def _block(scorer: Scorer, groups: Sequence[Group], advance: Callable[[int], None] | None) -> Scored:
    doubled = [group for group in groups for _ in range(2)]
    factors = [half for group in groups for half in halves(group.rewards)]
    scored = scorer(doubled, factors=factors)
    assert scored.features_ND is not None
    products_NHV = scored.products_NV.reshape(len(groups), 2, -1)
    features_ND = scored.features_ND.reshape(len(groups), 2, -1).sum(dim=1)
    pairs = zip(scored.ratios[::2], scored.ratios[1::2], strict=True)
    facts_NR = np.array([(first + second).facts for first, second in pairs]).reshape(len(groups), len(FACTS))
    if advance is not None:
        advance(len(groups))
    return replace(
        scored,
        products_NV=products_NHV.sum(axis=1),
        norms_N=features_ND.double().norm(dim=1).numpy(),
        ratio_facts_NR=facts_NR,
        features_ND=None,
        ratios=(),
        variances_N=np.array([group.variance for group in groups], dtype=np.float64),
        errors_NV=np.abs(products_NHV[:, 0] - products_NHV[:, 1]),
    )
