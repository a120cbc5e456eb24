"""Products of single trajectories, the prefix correction, and jackknife errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from tests.gradients.architectures import GROUPS, SETTINGS, draw_group, tiny
from tests.gradients.test_score_reliability import EQUAL, TRAIN

from cropi.functional.projection import SparseProjection
from cropi.gradients.groups import Group, SurrogateSettings
from cropi.gradients.influence_scorer import Scorer, ScorerOptions
from cropi.gradients.reference import prompt_gradient
from cropi.lab.audit.policy_audit import log_prefix_ratios, prefix_corrected
from cropi.lab.audit.trajectory_products import (
    TrajectoryProducts,
    jackknife_error,
    leave_one_out,
    trajectory_products,
)

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

VALIDATION = {"a": GROUPS[:2], "b": [GROUPS[1], GROUPS[2]]}
WIDE = SparseProjection(64, 0.5, seed=1, rank=2)


def aimed(settings: SurrogateSettings, **options: Any) -> Scorer:
    scorer = Scorer(tiny("gpt_neox"), settings, ScorerOptions(**options))
    scorer.aim(VALIDATION)
    return scorer


def without(group: Group, k: int) -> Group:
    """The group as if trajectory k had never been sampled."""
    keep = [j for j in range(len(group.completions)) if j != k]
    logprobs = group.behaviour_logprobs
    return Group(
        group.prompt_id,
        group.prompt_ids,
        [group.completions[j] for j in keep],
        [group.rewards[j] for j in keep],
        None if logprobs is None else [logprobs[j] for j in keep],
    )


@pytest.mark.parametrize("normalizer", ["sequence", "token", "constant"])
@pytest.mark.parametrize("options", [{"estimator": "exact"}, {"projection": WIDE}], ids=["exact", "sketch"])
def test_products_give_the_influence_of_the_group_and_of_every_part(normalizer: Any, options: dict[str, Any]) -> None:
    settings = dataclasses.replace(SETTINGS, normalizer=normalizer)
    scorer = aimed(settings, **options)
    found = [products for products, _ in trajectory_products(scorer, [*TRAIN, EQUAL])]
    whole = scorer([*TRAIN, EQUAL])
    np.testing.assert_allclose([one.products(settings)[0] for one in found], whole.products_NV, rtol=1e-9, atol=1e-12)
    assert not whole.products_NV[-1].any()
    ratios = [one.columns for one in whole.ratios]
    np.testing.assert_allclose([one.total().columns for one in found], ratios, rtol=1e-9, atol=1e-12)
    for group, one in zip(TRAIN[:2], found, strict=False):
        smaller = [without(group, k) for k in range(len(group.completions))]
        expected = scorer(smaller).products_NV
        parts = one.products(settings, leave_one_out(len(group.completions)))
        np.testing.assert_allclose(parts, expected, rtol=1e-9, atol=1e-12)
        kept = one.restricted(np.arange(1, len(group.completions)))
        np.testing.assert_allclose(kept.products(settings)[0], expected[0], rtol=1e-9, atol=1e-12)


def test_a_prefix_is_the_product_of_the_ratios_so_far() -> None:
    """Written out with autograd on the probability of the whole prefix."""
    model, group = tiny("llama"), draw_group(4, [3, 2], seed=5)
    settings = SurrogateSettings("constant", 1, advantage_std=False)
    (corrected,) = prefix_corrected(model, [group], settings.temperature, cap=1e9)
    found = prompt_gradient(model, corrected, settings).gradients
    total = torch.zeros((), dtype=torch.float64)
    mean = sum(group.rewards) / 2
    for completion, stored, reward in zip(
        group.completions, group.behaviour_logprobs or [], group.rewards, strict=True
    ):
        ids = torch.tensor([group.prompt_ids + completion])
        logits = model(ids).logits[0, len(group.prompt_ids) - 1 : -1].double()
        logs_T = torch.log_softmax(logits, -1)[range(len(completion)), completion]
        ratios_T = (logs_T - torch.tensor(stored, dtype=torch.float64)).exp()
        for t in range(len(completion)):
            # ratio_t is differentiated, the prefix before it is a weight
            total = total + ratios_T[:t].detach().prod() * ratios_T[t] * (reward - mean) / 2
    expected = torch.autograd.grad(total, list(model.parameters()))
    for gradient, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-9)


def test_a_prefix_product_is_capped() -> None:
    logs_T = torch.tensor([2.0, 0.5, 4.0, 1.1], dtype=torch.float64).log()
    assert log_prefix_ratios(logs_T, cap=3.5).exp().tolist() == pytest.approx([2.0, 1.0, 3.5, 3.5])
    on_policy = dataclasses.replace(GROUPS[0], behaviour_logprobs=None)
    assert prefix_corrected(tiny("llama"), [on_policy], 1.0) == [on_policy]


def test_ratio_statistics_by_hand() -> None:
    products = TrajectoryProducts(np.ones(1), np.ones(1, dtype=np.int64), np.zeros((1, 1)), None, [])
    assert products.total().columns == (1.0, 0.0, 0.0)
    model, group = tiny("llama"), draw_group(4, [3, 6], seed=6)
    scorer = Scorer(model, SETTINGS, ScorerOptions(estimator="exact"))
    scorer.aim({"a": [group]})
    logs = []
    for completion, stored in zip(group.completions, group.behaviour_logprobs or [], strict=True):
        logits = model(torch.tensor([group.prompt_ids + completion])).logits[0, len(group.prompt_ids) - 1 : -1]
        logprobs_T = torch.log_softmax(logits.double() / 0.8, -1)[range(len(completion)), completion]
        logs.append(logprobs_T.detach().numpy() - np.array(stored))
    ratios = np.exp(np.concatenate(logs))
    expected = (
        ratios.sum() ** 2 / (len(ratios) * (ratios**2).sum()),
        (abs(ratios - 1) > 0.2).mean(),
        (ratios * np.log(ratios) - ratios + 1).mean(),
    )
    np.testing.assert_allclose(scorer([group]).ratios[0].columns, expected, rtol=1e-6)


def test_the_jackknifes_error_is_the_spread_over_many_redraws() -> None:
    """One prompt, 600 trajectories: groups of 8 drawn from them have influences whose spread the jackknife, which sees
    8 trajectories only, has to name."""
    generator = np.random.default_rng(0)
    count = 600
    rewards_K = (generator.random(count) < 0.4) * 1.0
    group = Group(
        "p",
        [3, 4, 5],
        [generator.integers(2, 41, 4 + int(generator.integers(4))).tolist() for _ in range(count)],
        rewards_K.tolist(),
        None,
    )
    settings = dataclasses.replace(SETTINGS, normalizer="constant", advantage_std=False)
    (products, _) = next(trajectory_products(aimed(settings, estimator="exact"), [group]))
    drawn_X8 = np.array([generator.choice(count, 8, replace=False) for _ in range(3000)])
    spread_V = products.products(settings, drawn_X8).std(axis=0)
    found_XV = np.array([products.restricted(part).errors(settings) for part in drawn_X8[:800]])
    np.testing.assert_allclose(np.sqrt((found_XV**2).mean(axis=0)), spread_V, rtol=0.12)


def test_the_reliability_of_a_direction_is_that_of_its_halves() -> None:
    groups = [draw_group(5, [7, 4, 6], seed=50 + n) for n in range(5)]
    for estimator in ("exact", "reference"):
        scorer = Scorer(tiny("gpt_neox"), SETTINGS, ScorerOptions(estimator=estimator))  # type: ignore[arg-type]
        scorer.aim({"all": groups, "even": groups[::2], "odd": groups[1::2], "one": groups[:1]})
        halves = scorer.direction_cosines()[1, 2]
        assert scorer.direction_reliability["all"] == pytest.approx(2 * halves / (1 + halves), rel=1e-6)
        assert np.isnan(scorer.direction_reliability["one"])
        whole, even, odd = (scorer._directions[n] for n in (0, 1, 2))
        for name in whole:
            torch.testing.assert_close(whole[name], (3 * even[name] + 2 * odd[name]) / 5, rtol=1e-7, atol=1e-12)


def test_the_jackknife_error_of_a_mean_is_the_textbooks() -> None:
    values_K = np.random.default_rng(0).standard_normal(9)
    estimates_KV = values_K[leave_one_out(9)].mean(axis=1)[:, None]
    assert jackknife_error(estimates_KV)[0] == pytest.approx(values_K.std(ddof=1) / 3)


def test_two_trajectories_have_no_error() -> None:
    assert np.isnan(jackknife_error(np.zeros((2, 3)))).all()
    assert leave_one_out(3).tolist() == [[1, 2], [0, 2], [0, 1]]
