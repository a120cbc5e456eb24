"""Trajectories told apart: what groups are made of, corrections of the ratio, and errors from the spread."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from tests.gradients.architectures import GROUPS, SETTINGS, draw_group, tiny

from cropi.functional.projection import SparseProjection
from cropi.functional.resampling import leave_one_out
from cropi.gradients.groups import Group
from cropi.gradients.reference import prompt_gradient
from cropi.gradients.scorer import Scorer
from cropi.gradients.surrogate import SurrogateSettings
from cropi.gradients.units import Units, restricted

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

TRAIN = [draw_group(5, [7, 4, 1, 6], seed=11), draw_group(3, [2, 9, 5, 3, 8], seed=12), GROUPS[2]]
EQUAL = dataclasses.replace(GROUPS[0], prompt_id="equal", rewards=[1.0, 1.0, 1.0])
VALIDATION = {"a": GROUPS[:2], "b": [GROUPS[1], GROUPS[2]]}
WIDE = SparseProjection(64, 0.5, seed=1, rank=2)

CORRECTIONS: list[dict[str, Any]] = [
    {"correction": "clipped"},
    {"correction": "clipped", "clip": 0.6},
    {"correction": "prefix", "prefix_cap": 2.0},
    {"correction": "prefix", "prefix_cap": 1e9},
    {"baseline": "reweighted"},
    {"baseline": "reweighted", "correction": "prefix", "advantage_std": False},
]


def aimed(settings: SurrogateSettings, **options: Any) -> Scorer:
    scorer = Scorer(tiny("gpt_neox"), settings, **options)
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
def test_units_give_the_influence_of_the_group_and_of_every_part(normalizer: Any, options: dict[str, Any]) -> None:
    settings = dataclasses.replace(SETTINGS, normalizer=normalizer)
    scorer = aimed(settings, **options)
    units = [found for found, _, _ in scorer.units([*TRAIN, EQUAL])]
    whole = scorer([*TRAIN, EQUAL])
    np.testing.assert_allclose([u.products(settings)[0] for u in units], whole.products_NV, rtol=1e-9, atol=1e-12)
    assert not whole.products_NV[-1].any()
    np.testing.assert_allclose([u.total().facts for u in units], whole.ratio_facts_NR, rtol=1e-9, atol=1e-12)
    for group, found in zip(TRAIN[:2], units, strict=False):
        smaller = [without(group, k) for k in range(len(group.completions))]
        expected = scorer(smaller).products_NV
        parts = found.products(settings, leave_one_out(len(group.completions)))
        np.testing.assert_allclose(parts, expected, rtol=1e-9, atol=1e-12)
        kept = restricted(found, np.arange(1, len(group.completions)))
        np.testing.assert_allclose(kept.products(settings)[0], expected[0], rtol=1e-9, atol=1e-12)


def test_units_give_cosines_of_every_part() -> None:
    scorer = aimed(SETTINGS, projection=WIDE, score="cosine")
    for group, (units, _, _) in zip(TRAIN[:2], scorer.units(TRAIN[:2], grams=True), strict=True):
        smaller = [without(group, k) for k in range(len(group.completions))]
        expected = scorer.values(scorer(smaller))
        parts = units.values(SETTINGS, "cosine", scorer._norms_V, leave_one_out(len(group.completions)))
        np.testing.assert_allclose(parts, expected, rtol=1e-9)


@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_errors_are_the_jackknifes_over_groups_scored_anew(score: Any) -> None:
    scorer = aimed(SETTINGS, projection=WIDE, score=score)
    found = scorer([*TRAIN, EQUAL], standard_errors=True)
    plain = scorer([*TRAIN, EQUAL])
    np.testing.assert_allclose(scorer.values(found), scorer.values(plain), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.norms_N, plain.norms_N, rtol=1e-9, atol=1e-12)
    assert found.features_ND is not None
    torch.testing.assert_close(found.features_ND, plain.features_ND, rtol=1e-9, atol=1e-12)
    for row, group in enumerate(TRAIN[:2]):
        count = len(group.completions)
        values_KV = scorer.values(scorer([without(group, k) for k in range(count)]))
        expected = np.sqrt((count - 1) / count * ((values_KV - values_KV.mean(axis=0)) ** 2).sum(axis=0))
        np.testing.assert_allclose(found.errors_NV[row], expected, rtol=1e-7)
    assert np.isnan(found.errors_NV[2]).all()  # two trajectories: one alone has no advantage
    assert not found.errors_NV[3].any()


@pytest.mark.parametrize("changes", CORRECTIONS, ids=str)
def test_corrections_agree_with_autograd(changes: dict[str, Any]) -> None:
    settings = dataclasses.replace(SETTINGS, **changes)
    exact, reference = aimed(settings, estimator="exact"), aimed(settings, estimator="reference")
    groups = [*TRAIN, *GROUPS[:2]]
    expected = reference(groups).products_NV
    np.testing.assert_allclose(exact(groups).products_NV, expected, rtol=1e-8, atol=1e-12)
    plain = aimed(SETTINGS, estimator="exact")(groups).products_NV
    assert np.abs(plain[:2] - expected[:2]).max() > 1e-3 * np.abs(expected).max()
    units = [found.products(settings)[0] for found, _, _ in exact.units(groups)]
    np.testing.assert_allclose(units, expected, rtol=1e-8, atol=1e-12)


def test_a_prefix_goes_on_where_a_chunk_of_the_head_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(SETTINGS, correction="prefix", prefix_cap=1e9)
    whole = aimed(settings, estimator="exact")(TRAIN).products_NV
    for tokens in (1, 2, 5):
        monkeypatch.setattr("cropi.gradients.head.LOGITS_AT_ONCE", {"cpu": 41 * tokens})
        np.testing.assert_allclose(aimed(settings, estimator="exact")(TRAIN).products_NV, whole, rtol=1e-9)


def test_a_prefix_is_the_product_of_the_ratios_so_far() -> None:
    """Written out with autograd on the probability of the whole prefix."""
    model, group = tiny("llama"), draw_group(4, [3, 2], seed=5)
    settings = SurrogateSettings("constant", 1, correction="prefix", prefix_cap=1e9, advantage_std=False)
    found = prompt_gradient(model, group, settings).gradients
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


def test_ratio_moments_by_hand() -> None:
    units = Units(np.ones(1), np.ones(1, dtype=np.int64), np.zeros((1, 1)), None, [])
    assert units.total().facts == (1.0, 0.0, 0.0)
    model, group = tiny("llama"), draw_group(4, [3, 6], seed=6)
    scorer = Scorer(model, SETTINGS, estimator="exact")
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
    np.testing.assert_allclose(scorer([group]).ratio_facts_NR[0], expected, rtol=1e-6)
    (units, _, _) = next(scorer.units([group]))
    np.testing.assert_allclose([m.mean_log for m in units.ratios], [part.mean() for part in logs], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "reference"}, "exact"),
        ({"estimator": "exact", "score": "cosine"}, "sketch"),
    ],
)
def test_errors_that_cannot_be_had_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aimed(SETTINGS, **options)(TRAIN, standard_errors=True)


def test_no_more_features_than_fit_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = aimed(SETTINGS, projection=WIDE)
    together = scorer(TRAIN, standard_errors=True)
    monkeypatch.setattr("cropi.gradients.scorer.TRAJECTORIES", 6)
    apart = scorer(TRAIN, standard_errors=True)
    np.testing.assert_allclose(apart.products_NV, together.products_NV, rtol=1e-12)
    np.testing.assert_allclose(apart.errors_NV, together.errors_NV, rtol=1e-9)


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
    (units, _, _) = next(aimed(settings, estimator="exact").units([group]))
    drawn_X8 = np.array([generator.choice(count, 8, replace=False) for _ in range(3000)])
    spread_V = units.products(settings, drawn_X8).std(axis=0)
    found_XV = np.array([restricted(units, part).errors(settings, "dot", np.ones(2)) for part in drawn_X8[:800]])
    np.testing.assert_allclose(np.sqrt((found_XV**2).mean(axis=0)), spread_V, rtol=0.12)


def test_the_reliability_of_a_direction_is_that_of_its_halves() -> None:
    groups = [draw_group(5, [7, 4, 6], seed=50 + n) for n in range(5)]
    for estimator in ("exact", "reference"):
        scorer = Scorer(tiny("gpt_neox"), SETTINGS, estimator=estimator)  # type: ignore[arg-type]
        scorer.aim({"all": groups, "even": groups[::2], "odd": groups[1::2], "one": groups[:1]})
        halves = scorer.direction_cosines()[1, 2]
        assert scorer.direction_reliability["all"] == pytest.approx(2 * halves / (1 + halves), rel=1e-6)
        assert np.isnan(scorer.direction_reliability["one"])
        whole, even, odd = (scorer._directions[n] for n in (0, 1, 2))
        for name in whole:
            torch.testing.assert_close(whole[name], (3 * even[name] + 2 * odd[name]) / 5, rtol=1e-7, atol=1e-12)
