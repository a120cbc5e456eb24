"""Errors from halves of a group, and the validation prompts' own influence, against the reference estimator."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cropi.gradients.validation_scores import score_validation_prompts
from tests.gradients.architectures import GROUPS, SETTINGS, draw_group, tiny

from cropi.functional.projection import SparseProjection
from cropi.gradients.influence_scorer import Scorer, ScorerOptions
from cropi.gradients.reference import prompt_gradient
from cropi.gradients.score_reliability import half_factors, score_by_halves

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

TRAIN = [draw_group(5, [7, 4, 1, 6], seed=11), draw_group(3, [2, 9, 5, 3, 8], seed=12), GROUPS[2]]
EQUAL = dataclasses.replace(GROUPS[0], prompt_id="equal", rewards=[1.0, 1.0, 1.0])
VALIDATION = {"a": GROUPS[:2], "b": [GROUPS[1], GROUPS[2], draw_group(4, [3, 6, 2], seed=13)]}
# Every coordinate is kept and the dimension is far larger than their number: hardly any two share a place.
NEARLY_EXACT = SparseProjection(dim=1 << 18, keep_fraction=1.0, mask="uniform", seed=3)


def aimed(projection: SparseProjection = NEARLY_EXACT) -> Scorer:
    scorer = Scorer(tiny("gpt_neox"), SETTINGS, ScorerOptions(projection=projection))
    scorer.aim(VALIDATION)
    return scorer


def test_halves_share_the_rewards_evenly() -> None:
    assert half_factors([0.0, 1.0, 0.0, 1.0]) == ([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0])
    assert half_factors([0.0, 0.0, 1.0]) == ([0.0, 1.0, 1.0], [1.0, 0.0, 0.0])


def test_two_halves_are_the_whole_and_their_difference_the_error() -> None:
    scorer, groups = aimed(), [*TRAIN, EQUAL]
    plain, found = scorer(groups), score_by_halves(scorer, groups)
    np.testing.assert_allclose(found.products_NV, plain.products_NV, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.norms_N, plain.norms_N, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.ratio_columns_NR, plain.ratio_columns_NR, rtol=1e-6)
    assert found.errors_NV is not None
    for n, group in enumerate(groups):
        first, second = half_factors(group.rewards)
        parts = scorer([group, group], factors=[first, second]).products_NV
        np.testing.assert_allclose(found.errors_NV[n], np.abs(parts[0] - parts[1]), rtol=1e-4, atol=1e-7)
    assert (found.errors_NV[:3] > 0).all()
    assert (found.errors_NV[3] == 0).all()


def test_squared_error_is_the_variance_over_draws() -> None:
    """Groups drawn anew, with as many right answers each time, from one prompt's pool of trajectories."""
    pool = draw_group(4, [3, 5, 2, 6, 4, 3, 5, 4, 6, 2, 3, 4, 5, 3, 2, 6], seed=21, on_policy=True)
    generator, draws = np.random.default_rng(0), []
    for number in range(160):
        chosen = [*generator.integers(0, 8, 4), *generator.integers(8, 16, 4)]  # with replacement: independent
        completions = [pool.completions[k] for k in chosen]
        rewards = [1.0] * 4 + [0.0] * 4
        draws.append(dataclasses.replace(pool, prompt_id=str(number), completions=completions, rewards=rewards))
    found = score_by_halves(aimed(dataclasses.replace(NEARLY_EXACT, dim=2048)), draws)
    assert found.errors_NV is not None
    variance_V, squared_V = found.products_NV.var(axis=0, ddof=1), (found.errors_NV**2).mean(axis=0)
    np.testing.assert_allclose(squared_V, variance_V, rtol=0.35)


def test_validation_prompts_do_not_count_for_themselves() -> None:
    rows, computed = score_validation_prompts(aimed(), VALIDATION)
    model = tiny("gpt_neox")
    gradients = {
        name: [prompt_gradient(model, group, SETTINGS, batch_tokens=1 << 20).gradients for group in groups]
        for name, groups in VALIDATION.items()
    }
    assert computed > 0
    assert [(row["set"], row["prompt_id"]) for row in rows] == [
        (name, group.prompt_id) for name, groups in VALIDATION.items() for group in groups
    ]
    at = 0
    for name, own in gradients.items():
        for j, mine in enumerate(own):
            for column, others in gradients.items():
                rest = [g for k, g in enumerate(others) if not (column == name and k == j)]
                mean = {p: sum(g[p].double() for g in rest) / len(rest) for p in mine}
                wanted = float(sum((mine[p].double() * mean[p]).sum() for p in mine))
                lengths = [float(sum((g[p].double() ** 2).sum() for p in mine)) ** 0.5 for g in (mine, mean)]
                assert abs(rows[at][f"influence/{column}"] - wanted) < 5e-3 * lengths[0] * lengths[1]
            at += 1


def test_the_only_prompt_of_a_set_says_nothing_of_it() -> None:
    scorer = Scorer(tiny("gpt_neox"), SETTINGS, ScorerOptions(projection=NEARLY_EXACT))
    scorer.aim({"a": GROUPS[:1]})
    rows, _ = score_validation_prompts(scorer, {"a": GROUPS[:1]})
    assert rows[0]["influence/a"] == 0.0
