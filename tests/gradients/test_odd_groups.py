"""`cropi.influence` on groups that are odd or broken: they get a status, and no other number changes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.gradients.architectures import GROUPS, SETTINGS, draw_group, tiny

import cropi
from cropi.errors import SignalError
from cropi.functional.projection import SparseProjection
from cropi.gradients.group_influence import InfluenceScores
from cropi.gradients.groups import Group
from cropi.gradients.influence_scorer import ScorerOptions
from cropi.gradients.reference import prompt_gradient

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

NAN, INF = math.nan, math.inf
BASE = draw_group(4, [5, 3, 6], seed=31)
VALIDATION = {
    "a": [draw_group(5, [4, 6, 2], seed=11)],
    "b": [draw_group(3, [5, 9], seed=13), draw_group(2, [3, 3], seed=14)],
}

ESTIMATORS: dict[str, dict[str, Any]] = {
    "exact": {"estimator": "exact"},
    "reference": {"estimator": "reference"},
    "uniform": {"projection": SparseProjection(128, 0.5, 1, "uniform")},
    "structured": {"projection": SparseProjection(128, 0.5, 1, rank=2)},
}


def with_logprob(value: float) -> Group:
    logprobs = [list(row) for row in BASE.behaviour_logprobs or []]
    logprobs[1][1] = value
    return dataclasses.replace(BASE, behaviour_logprobs=logprobs)


def all_logprobs(value: float) -> Group:
    return dataclasses.replace(BASE, behaviour_logprobs=[[value] * len(c) for c in BASE.completions])


ODD: dict[str, tuple[Group, str]] = {
    "NaN behaviour log-prob": (with_logprob(NAN), "non_finite"),
    "a ratio of infinity": (with_logprob(-INF), "non_finite"),
    "NaN reward": (dataclasses.replace(BASE, rewards=[1.0, NAN, 0.0]), "non_finite"),
    "infinite reward": (dataclasses.replace(BASE, rewards=[1.0, INF, 0.0]), "non_finite"),
    "equal rewards": (dataclasses.replace(BASE, rewards=[1.0] * 3), "no_signal"),
    "all completions empty": (Group("p", [5, 6, 7], [[], []], [1.0, 0.0], [[], []]), "no_signal"),
    "one completion": (Group("p", [5, 6, 7], [[8, 9]], [1.0], None), "no_signal"),
    "no completion": (Group("p", [5, 6, 7], [], [], []), "no_signal"),
    "an empty completion": (Group("p", [5, 6], [[], [7, 8]], [1.0, 0.0], [[], [-2.0, -1.0]]), "ok"),
    "completions of one token": (Group("p", [5, 6], [[7], [8]], [1.0, 0.0], [[-2.0], [-1.0]]), "ok"),
    "nothing but one-token prompt and completions": (Group("p", [5], [[5], [6]], [1.0, 0.0], None), "ok"),
    "truncated completions": (Group("p", [5, 6], [[7] * 16, [8] * 16], [1.0, 0.0], None), "ok"),
}


def scores(
    model: Any, train: list[Group], estimator: str, *, score: Any = "dot", standard_errors: bool = False
) -> InfluenceScores:
    options = ScorerOptions(score=score, batch_tokens=10_000, **ESTIMATORS[estimator])
    return cropi.influence(
        model, train, VALIDATION, surrogate=SETTINGS, options=options, standard_errors=standard_errors
    )


@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_odd_groups_get_a_status_and_change_nothing_for_others(estimator: str, score: str) -> None:
    model = tiny("gpt_neox")
    healthy = scores(model, GROUPS, estimator, score=score)
    assert healthy.status == ["ok"] * 3
    for name, (group, status) in ODD.items():
        found = scores(model, [GROUPS[0], group, *GROUPS[1:]], estimator, score=score)
        assert found.status == ["ok", status, "ok", "ok"], name
        np.testing.assert_allclose(found.values[[0, 2, 3]], healthy.values, rtol=1e-11, err_msg=name)
        np.testing.assert_allclose(found.ratio_ess[[0, 2, 3]], healthy.ratio_ess, rtol=1e-11, err_msg=name)
        assert np.isfinite(found.values).all(), name
        assert bool(found.values[1].any()) == (status == "ok"), name


@pytest.mark.parametrize("estimator", ["uniform", "structured"])
def test_all_odd_groups_at_once_in_one_pack_of_float32(estimator: str) -> None:
    model = tiny("llama_tied").float()
    groups = [group for group, _ in ODD.values()]
    healthy = scores(model, GROUPS, estimator)
    found = scores(model, [*groups, *GROUPS], estimator, standard_errors=True)
    assert found.status == [status for _, status in ODD.values()] + ["ok"] * 3
    np.testing.assert_allclose(found.values[-3:], healthy.values, rtol=1e-4, atol=1e-5)
    alone = scores(model, GROUPS, estimator, standard_errors=True)
    np.testing.assert_allclose(found.standard_errors[-3:], alone.standard_errors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, (_, status) in ODD.items() if status == "ok"])
def test_odd_groups_with_signal_have_the_influence_that_autograd_gives(name: str) -> None:
    model, group = tiny("gpt_neox"), ODD[name][0]
    exact, reference = (scores(model, [group], estimator) for estimator in ("exact", "reference"))
    np.testing.assert_allclose(exact.values, reference.values, rtol=1e-9, atol=1e-12)
    assert bool(exact.values.all())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("logprob", "status"), [(1000.0, "ok"), (-400.0, "ok"), (-800.0, "non_finite"), (-INF, "non_finite")]
)
def test_ratios_that_vanish_or_overflow_are_no_error(estimator: str, logprob: float, status: str) -> None:
    """exp(log pi - log beta) of all of a group's tokens is 0, or beyond what can be squared, or infinite."""
    model = tiny("gpt_neox")
    healthy = scores(model, GROUPS, estimator)
    found = scores(model, [*GROUPS, all_logprobs(logprob)], estimator)
    np.testing.assert_allclose(found.values[:3], healthy.values, rtol=1e-11)
    assert np.isfinite(found.values).all()
    assert found.status[3] == status
    assert bool(found.values[3].any()) == (logprob == -400.0)


@pytest.mark.parametrize("estimator", ["exact", "structured"])
def test_a_policy_that_has_left_its_behaviour_far_behind_can_be_scored(estimator: str) -> None:
    """In float32 a log-prob below -104 has a ratio of 0; a group may consist of such tokens alone."""
    model = tiny("gpt_neox").float()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(300.0)
    group = Group("p", [5, 6], [[7, 8], [9]], [1.0, 0.0], [[-0.1, -0.1], [-0.1]])
    assert not any(bool(g.any()) for g in prompt_gradient(model, group, SETTINGS).gradients.values())
    found = scores(model, [group, *GROUPS], estimator)
    assert found.status[0] == "ok"
    assert not found.values[0].any()


@pytest.mark.parametrize("validation_mean", ["plain", "normalized"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_without_signal_count_as_zeros_in_a_validation_set(estimator: str, validation_mean: str) -> None:
    model = tiny("gpt_neox")
    empty = [group for group, status in ODD.values() if status == "no_signal"]
    plain, diluted = (
        cropi.influence(
            model,
            GROUPS,
            {"a": [BASE, *others]},
            surrogate=SETTINGS,
            options=ScorerOptions(validation_mean=validation_mean, **ESTIMATORS[estimator]),
        ).values
        for others in ([], empty)
    )
    np.testing.assert_allclose(diluted * (1 + len(empty)), plain, rtol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_validation_set_that_gives_no_direction_is_an_error_that_names_it(estimator: str) -> None:
    model = tiny("gpt_neox")
    options = ScorerOptions(**ESTIMATORS[estimator])
    silent = [group for group, status in ODD.values() if status == "no_signal"]
    for groups in (silent, []):
        with pytest.raises(SignalError, match="validation set dull"):
            cropi.influence(model, GROUPS, {"fine": [BASE], "dull": groups}, options=options)
    for group in (group for group, status in ODD.values() if status == "non_finite"):
        with pytest.raises(SignalError, match="validation set broken"):
            cropi.influence(model, GROUPS, {"broken": [BASE, group]}, options=options)


def test_no_training_group_at_all() -> None:
    found = scores(tiny("gpt_neox"), [], "exact")
    assert found.values.shape == (0, 2)
    assert found.status == []


def test_tokens_given_and_computed() -> None:
    found = scores(tiny("gpt_neox"), [*GROUPS, ODD["equal rewards"][0]], "exact")
    given = [len(g.prompt_ids) * len(g.completions) + g.completion_tokens for g in [*GROUPS, BASE]]
    computed = [len(g.prompt_ids) + g.completion_tokens - len(g.completions) for g in GROUPS]
    assert (found.tokens_given, found.tokens_computed) == (sum(given), sum(computed))


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="max_completion_length"):
        cropi.SurrogateSettings(normalizer="constant")
