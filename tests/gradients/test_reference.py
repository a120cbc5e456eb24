"""The estimator against finite differences and against the surrogate written out by hand."""

import dataclasses

import pytest
import torch
from tests.conftest import tiny_llama
from tests.gradients.architectures import draw_group, tiny
from transformers import LlamaForCausalLM

from cropi.gradients.groups import Group
from cropi.gradients.reference import prompt_gradient, trainable_parameters
from cropi.gradients.surrogate_weights import SurrogateSettings
from cropi.policy import completion_logprobs

GROUP = Group(
    "p",
    [3, 4, 5, 6],
    [[7, 8, 1], [9, 1], [2, 2, 2, 2, 2], [1], [10, 11, 12, 1]],
    [1.0, 0.0, 0.0, 1.0, 0.5],
    [[-1.0, -2.0, -0.5], [-3.0, -0.1], [-2.0, -2.5, -1.0, -3.0, -2.0], [-0.7], [-1.5, -2.5, -0.5, -1.0]],
)
ON_POLICY = dataclasses.replace(GROUP, behaviour_logprobs=None)
SETTINGS = SurrogateSettings("sequence", max_completion_length=8, temperature=0.8)


def surrogate(
    model: LlamaForCausalLM, group: Group, settings: SurrogateSettings, behaviour: list[list[float]]
) -> float:
    """L(theta) = sum_k (1/Z_k) sum_t rho_{k,t} A_k by plain loops, one trajectory at a time, without padding."""
    rewards = torch.tensor(group.rewards, dtype=torch.float64)
    advantages = rewards - rewards.mean()
    if settings.advantage_std:
        advantages = advantages / (rewards.std() + 1e-4)
    count = len(group.completions)
    total = 0.0
    for k, completion in enumerate(group.completions):
        z = {
            "sequence": count * len(completion),
            "token": sum(map(len, group.completions)),
            "constant": count * settings.max_completion_length,
        }[settings.normalizer]
        ids = torch.tensor([group.prompt_ids + completion])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0] / settings.temperature, dim=-1)
        for t, token in enumerate(completion):
            ratio = (logprobs[len(group.prompt_ids) + t - 1, token] - behaviour[k][t]).exp()
            total += float(ratio * advantages[k]) / z
    return total


@pytest.mark.parametrize("normalizer", ["sequence", "token", "constant"])
@pytest.mark.parametrize("std", [True, False])
def test_gradient_meets_central_finite_differences(model: LlamaForCausalLM, normalizer: str, std: bool) -> None:
    # transformers' Llama takes norms and softmax in float32, which bounds the agreement at about 1e-4
    settings = dataclasses.replace(SETTINGS, normalizer=normalizer, advantage_std=std)
    gradient = prompt_gradient(model, GROUP, settings).gradients
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable_parameters(model).items():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        step = 1e-3
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                values.append(surrogate(model, GROUP, settings, GROUP.behaviour_logprobs))
                parameter.sub_(direction, alpha=sign * step)
        numeric = (values[0] - values[1]) / (2 * step)
        analytic = float((gradient[name] * direction).sum())
        assert analytic == pytest.approx(numeric, rel=2e-3, abs=2e-5), name


def test_on_policy_means_ratio_one(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        own = []
        for completion in GROUP.completions:
            ids = torch.tensor([GROUP.prompt_ids + completion])
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0] / SETTINGS.temperature, dim=-1)
            own.append([float(logprobs[len(GROUP.prompt_ids) + t - 1, x]) for t, x in enumerate(completion)])
    exact = prompt_gradient(model, dataclasses.replace(GROUP, behaviour_logprobs=own), SETTINGS)
    assumed = prompt_gradient(model, ON_POLICY, SETTINGS)
    assert exact.ratio_ess == pytest.approx(1.0)
    for name, gradient in assumed.gradients.items():
        torch.testing.assert_close(gradient, exact.gradients[name], rtol=1e-4, atol=1e-7)


def test_micro_batches_and_order_do_not_change_the_gradient(model: LlamaForCausalLM) -> None:
    together = prompt_gradient(model, GROUP, SETTINGS).gradients
    one_by_one = prompt_gradient(model, GROUP, SETTINGS, batch_tokens=1).gradients
    order = [4, 2, 0, 3, 1]
    turned = Group(
        "p",
        GROUP.prompt_ids,
        [GROUP.completions[k] for k in order],
        [GROUP.rewards[k] for k in order],
        [GROUP.behaviour_logprobs[k] for k in order],
    )
    reordered = prompt_gradient(model, turned, SETTINGS).gradients
    for name, gradient in together.items():
        torch.testing.assert_close(one_by_one[name], gradient, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(reordered[name], gradient, rtol=1e-4, atol=1e-7)


def test_tied_weights_are_counted_once_with_both_paths() -> None:
    tied, untied = tiny_llama(tied=True), tiny_llama(tied=False)
    untied.load_state_dict(
        {**tied.state_dict(), "lm_head.weight": tied.state_dict()["model.embed_tokens.weight"].clone()}
    )
    assert "lm_head.weight" not in trainable_parameters(tied)
    both = prompt_gradient(untied, GROUP, SETTINGS).gradients
    one = prompt_gradient(tied, GROUP, SETTINGS).gradients
    summed = both["model.embed_tokens.weight"] + both["lm_head.weight"]
    torch.testing.assert_close(one["model.embed_tokens.weight"], summed, rtol=1e-5, atol=1e-9)


def test_the_model_is_left_as_it_was(model: LlamaForCausalLM) -> None:
    model.train()
    before = torch.random.get_rng_state()
    marker = torch.ones_like(model.model.norm.weight)
    model.model.norm.weight.grad = marker.clone()
    prompt_gradient(model, GROUP, SETTINGS)
    assert model.training
    assert torch.equal(model.model.norm.weight.grad, marker)
    assert model.model.layers[0].self_attn.q_proj.weight.grad is None
    assert torch.equal(torch.random.get_rng_state(), before)


def test_equal_rewards_cost_nothing_and_give_zero(model: LlamaForCausalLM) -> None:
    group = dataclasses.replace(GROUP, rewards=[1.0] * 5)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    gradient = prompt_gradient(model, group, SETTINGS).gradients
    assert not calls
    assert all(float(g.abs().sum()) == 0 for g in gradient.values())
    assert group.status == "no_signal"
    assert GROUP.status == "ok"


def test_padding_under_a_sliding_window_changes_no_logprob() -> None:
    """A padded row beyond the window sees no key at all; whatever its attention makes of that must not count."""
    model = tiny("gemma2")
    group = draw_group(2, [9, 1], seed=1)
    padded, _ = completion_logprobs(model, [group.prompt_ids] * 2, group.completions, temperature=1.0)
    alone, _ = completion_logprobs(model, [group.prompt_ids], group.completions[1:], temperature=1.0)
    torch.testing.assert_close(padded[1, :1], alone[0], rtol=1e-5, atol=1e-7)


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
