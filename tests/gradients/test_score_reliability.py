"""Errors from halves of a group, and the warning of drift."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from tests.gradients.architectures import GROUPS, SETTINGS, draw_group, tiny

from cropi.functional.projection import SparseProjection
from cropi.gradients.influence_scorer import Scorer, ScorerOptions, half_factors, score_by_halves
from cropi.stages.score import drift_warning

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

TRAIN = [draw_group(5, [7, 4, 1, 6], seed=11), draw_group(3, [2, 9, 5, 3, 8], seed=12), GROUPS[2]]
EQUAL = dataclasses.replace(GROUPS[0], prompt_id="equal", rewards=[1.0, 1.0, 1.0])
VALIDATION = {"a": GROUPS[:2], "b": [GROUPS[1], GROUPS[2], draw_group(4, [3, 6, 2], seed=13)]}
# Every coordinate is kept and the dimension is far larger than their number: hardly any two share a place.
NEARLY_EXACT = SparseProjection(dim=1 << 18, keep_fraction=1.0, mask="uniform", seed=3)


def aimed(projection: SparseProjection = NEARLY_EXACT, estimator: Any = "sketch", score: Any = "dot") -> Scorer:
    scorer = Scorer(tiny("gpt_neox"), SETTINGS, ScorerOptions(estimator, score, projection=projection))
    scorer.aim(VALIDATION)
    return scorer


def test_halves_share_the_rewards_evenly() -> None:
    assert half_factors([0.0, 1.0, 0.0, 1.0]) == ([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0])
    assert half_factors([0.0, 0.0, 1.0]) == ([0.0, 1.0, 1.0], [1.0, 0.0, 0.0])


@pytest.mark.parametrize("estimator", ["sketch", "exact", "reference"])
def test_two_halves_are_the_whole_and_their_difference_the_error(estimator: str) -> None:
    scorer, groups = aimed(estimator=estimator), [*TRAIN, EQUAL]
    plain, found = scorer(groups), score_by_halves(scorer, groups)
    np.testing.assert_allclose(found.products_NV, plain.products_NV, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.norms_N, plain.norms_N, rtol=1e-4, atol=1e-7)
    for one, other in zip(found.ratios, plain.ratios, strict=True):
        np.testing.assert_allclose(one.columns, other.columns, rtol=1e-6)
    for n, group in enumerate(groups):
        first, second = half_factors(group.rewards)
        parts = scorer([group, group], factors=[first, second]).products_NV
        np.testing.assert_allclose(found.errors_NV[n], np.abs(parts[0] - parts[1]), rtol=1e-4, atol=1e-7)
    assert (found.errors_NV[:3] > 0).all()
    assert (found.errors_NV[3] == 0).all()


@pytest.mark.parametrize("estimator", ["exact", "reference"])
def test_errors_without_projection_are_those_of_features_that_keep_everything(estimator: str) -> None:
    sketched, found = (score_by_halves(aimed(estimator=kind, score="cosine"), TRAIN) for kind in ("sketch", estimator))
    assert sketched.errors_NV is not None
    assert found.errors_NV is not None
    np.testing.assert_allclose(found.errors_NV, sketched.errors_NV, atol=0.02 * sketched.errors_NV.max())


@pytest.mark.parametrize(
    ("drift", "said"),
    [
        (None, None),
        ({"ratio_ess": 0.5, "clip_share": 0.3, "kl": 0.1}, None),
        ({"ratio_ess": 0.49, "clip_share": 0.0, "kl": 0.0}, "keeps 49% of its effective"),
        ({"ratio_ess": 1.0, "clip_share": 0.31, "kl": 0.0}, "31% of the importance ratios"),
        ({"ratio_ess": 1.0, "clip_share": 0.0, "kl": 0.25}, "0.25 nats a token"),
    ],
)
def test_drift_is_told_beyond_its_limits_only(drift: dict[str, float] | None, said: str | None) -> None:
    text = drift_warning(drift, 2)
    assert (text is None) == (said is None)
    assert said is None or (str(text).startswith("stage 2: ") and said in str(text))
