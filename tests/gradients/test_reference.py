"""What the reference estimator computes, skips and leaves alone; test_architectures.py says that it is right."""

import dataclasses

import pytest
import torch
from tests.conftest import tiny_llama
from tests.gradients.footprint import check_unchanged, state

from cropi.gradients.groups import Group, SurrogateSettings, ratio_statistics
from cropi.gradients.packing import Span
from cropi.gradients.reference import prompt_gradient

GROUP = Group(
    "p",
    [3, 4, 5, 6],
    [[7, 8, 1], [9, 1], [2, 2, 2, 2, 2], [1], [10, 11, 12, 1]],
    [1.0, 0.0, 0.0, 1.0, 0.5],
    [[-1.0, -2.0, -0.5], [-3.0, -0.1], [-2.0, -2.5, -1.0, -3.0, -2.0], [-0.7], [-1.5, -2.5, -0.5, -1.0]],
)
SETTINGS = SurrogateSettings("sequence", max_completion_length=8, temperature=0.8)


@pytest.mark.parametrize(
    ("ratios", "share"), [([1.0] * 7, 1), ([1.0, 0.0, 0.0, 0.0], 0.25), ([1.0, 3.0], 16 / (2 * 10))]
)
def test_effective_share_by_hand(ratios: list[float], share: float) -> None:
    log_ratios_T = torch.tensor(ratios, dtype=torch.float64).log()
    assert ratio_statistics(log_ratios_T, [Span(0, 0, len(ratios))])[0].effective_share == pytest.approx(share)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama().train()
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    before = state(model)
    prompt_gradient(model, GROUP, SETTINGS)
    check_unchanged(model, before)


def test_equal_rewards_cost_nothing_and_give_zero() -> None:
    model, group = tiny_llama(), dataclasses.replace(GROUP, rewards=[1.0] * 5)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    gradient = prompt_gradient(model, group, SETTINGS).gradients
    assert not calls
    assert all(float(g.abs().sum()) == 0 for g in gradient.values())
    assert group.status == "no_signal"
    assert GROUP.status == "ok"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, "no token"),
        ({"rewards": [1.0]}, "completions"),
        ({"behaviour_logprobs": [[-1.0]] * 5}, "differ in length"),
    ],
)
def test_a_malformed_group_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GROUP, **change)
