"""Measured and predicted change: exact where they can be known, and equal in the limit of small steps."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from measured_improvement import (
    Kind,
    Objective,
    PromptScores,
    adam_update,
    inner,
    kinds,
    mean_gradient,
    moved,
    preconditioned,
    preconditioner,
    rank_agreement,
    reward_gradient,
    second_moment,
    slope,
)
from tests.conftest import VOCABULARY, tiny_llama
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import cropi
from cropi.gradients.engine import Engine
from cropi.gradients.groups import Group
from cropi.gradients.reference import prompt_gradient, trainable_parameters
from cropi.gradients.surrogate_weights import SurrogateSettings

SETTINGS = SurrogateSettings("constant", 4)
PROMPTS = [[3, 5, 4], [7, 2], [6, 11, 9, 8]]
STEP = 0.05


def rewarded(completion: list[int]) -> float:
    """A reward that depends on the whole completion."""
    return float(sum(completion) % 3 == 0)


def draw(model: nn.Module, prompt: list[int], count: int, length: int, seed: int) -> Group:
    """Completions of exactly `length` tokens, sampled from the policy one token at a time."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor([prompt] * count)
    with torch.no_grad():
        for _ in range(length):
            probabilities = model(input_ids=rows, use_cache=False).logits[:, -1].softmax(dim=-1)
            rows = torch.cat([rows, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    completions = rows[:, len(prompt) :].tolist()
    return Group(f"{prompt}", prompt, completions, [rewarded(c) for c in completions], None)


def random_update(model: nn.Module, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in trainable_parameters(model).items()
    }
    found["model.embed_tokens.weight"][0] = 0  # torch gives the padding token's input no gradient
    return found


def expected_reward(model: nn.Module, prompt: list[int], length: int) -> Tensor:
    """E[r] over all completions of `length` tokens, by writing them all out."""
    completions = [list(c) for c in itertools.product(range(VOCABULARY), repeat=length)]
    rows = torch.tensor([prompt + c for c in completions])
    logs = model(input_ids=rows, use_cache=False).logits[:, len(prompt) - 1 : -1].log_softmax(dim=-1)
    chosen = logs.gather(-1, rows[:, len(prompt) :, None]).squeeze(-1).sum(dim=1)
    return (chosen.exp() * torch.tensor([rewarded(c) for c in completions], dtype=logs.dtype)).sum()


def groups(model: nn.Module, count: int = 16, seed: int = 0) -> list[Group]:
    return [draw(model, prompt, count, 3, seed + n) for n, prompt in enumerate(PROMPTS)]


def norm(self: Any, hidden: Tensor) -> Tensor:
    """A root-mean-square norm in the dtype of the weights, where transformers takes float32."""
    return self.weight * hidden * (hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def test_measured_over_predicted_tends_to_one_at_the_rate_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    model = tiny_llama()
    samples = groups(model)
    engine, objective = Engine(model, SETTINGS), Objective(model, {"v": samples})
    update = random_update(model)
    predicted = inner(update, reward_gradient(engine, samples))
    errors = []
    for step in (4e-6, 2e-6, 1e-6, 5e-7):
        with moved(engine.parameters, update, step):
            errors.append(objective.change().values_V[0] / (step * predicted) - 1)
    assert abs(errors[-1]) < 1e-3
    np.testing.assert_allclose(np.array(errors[:-1]) / errors[1:], 2, rtol=0.01)  # the next term is of second order


def test_the_change_is_unbiased_at_any_step() -> None:
    """Against the expectation over all completions, written out: within the stated standard error."""
    model, prompt = tiny_llama(), PROMPTS[0]
    update, scores = random_update(model), []
    with torch.no_grad():
        before = expected_reward(model, prompt, 2)
        parameters = trainable_parameters(model)
        with moved(parameters, update, STEP):
            exact = float(expected_reward(model, prompt, 2) - before)
    assert abs(exact) > 0.01
    for seed in range(20):
        objective = Objective(model, {"v": [draw(model, prompt, 400, 2, seed)]})
        with moved(parameters, update, STEP):
            change = objective.change()
        assert 0 < change.effective_share < 1
        scores.append((change.values_V[0] - exact) / change.errors_V[0])
    assert abs(np.mean(scores)) < 4 / np.sqrt(20)
    assert 0.5 < np.std(scores) < 1.6  # the standard errors are of the right size


def test_the_reward_gradient_is_that_of_the_expected_reward() -> None:
    model, prompt = tiny_llama(), PROMPTS[1]
    parameters = trainable_parameters(model)
    exact = torch.autograd.grad(expected_reward(model, prompt, 2), list(parameters.values()))
    update = dict(zip(parameters, exact, strict=True))
    truth = inner(update, update)
    engine, many = Engine(model, SETTINGS), draw(model, prompt, 5400, 2, 0)
    # groups of three, so that a forgotten K / (K - 1) would show
    drawn = [
        Group(f"{n}", prompt, many.completions[n : n + 3], many.rewards[n : n + 3], None) for n in range(0, 5400, 3)
    ]
    found = [inner(update, reward_gradient(engine, drawn[start : start + 60])) for start in range(0, len(drawn), 60)]
    error = np.std(found, ddof=1) / np.sqrt(len(found))
    assert truth > 12 * error  # a third less would be four errors off
    assert abs(np.mean(found) - truth) < 3.5 * error


def test_the_change_counts_prompts_without_signal_and_keeps_sets_apart() -> None:
    model = tiny_llama()
    first, second, third = groups(model)
    flat = replace(third, rewards=[1.0] * len(third.rewards))
    objective = Objective(model, {"a": [first, flat], "b": [second]})
    alone = {name: Objective(model, {name: [group]}) for name, group in (("a", first), ("b", second))}
    with moved(trainable_parameters(model), random_update(model), 1e-3):
        change = objective.change()
        expected = [alone["a"].change().values_V[0] / 2, alone["b"].change().values_V[0]]
    np.testing.assert_allclose(change.values_V, expected, rtol=1e-9)
    np.testing.assert_array_equal(objective.change().values_V, [0, 0])  # back at theta, bit for bit


def test_the_adam_update_is_torchs_from_the_same_second_moment() -> None:
    parameter = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    gradient, moment = torch.tensor([1.0, -2.0, 1e-3, 0.0, 5.0]), torch.tensor([1.0, 1e-4, 1e-6, 0.5, 0.0])
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.0, 0.999), eps=1e-8, maximize=True)
    parameter.grad = gradient.double()
    # many steps ago, so that torch's bias correction is 1
    optimizer.state[parameter] = {
        "step": torch.tensor(1e6),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": moment.double().clone(),
    }
    optimizer.step()
    found = adam_update({"p": gradient.double()}, {"p": moment.double()})["p"]
    torch.testing.assert_close(found, parameter.detach())


def test_second_moment_and_preconditioner_by_hand() -> None:
    moment = second_moment([{"p": torch.tensor([3.0, 0.0])}, {"p": torch.tensor([1.0, 0.0])}])
    assert moment["p"].tolist() == [5.0, 0.0]
    diagonal = preconditioner({"p": torch.tensor([4.0, 0.0])}, eps=0.0)
    assert preconditioned({"p": torch.tensor([3.0, 7.0])}, diagonal)["p"].tolist() == [1.5, 0.0]


@functools.cache
def scored() -> tuple[nn.Module, list[Group], dict[str, list[Group]], PromptScores]:
    model = tiny_llama()
    train = [
        draw(model, prompt, 6, length, 30 + n)
        for n, (prompt, length) in enumerate(zip(PROMPTS, (1, 2, 4), strict=True))
    ]
    train = [replace(g, completions=[c[: 1 + k % len(c)] for k, c in enumerate(g.completions)]) for g in train]
    train.append(replace(train[0], rewards=[1.0] * 6))
    validation = {"a": groups(model, 8, 50), "b": groups(model, 8, 60)[:2]}
    ones = {name: torch.ones_like(p.detach()) * 4 for name, p in trainable_parameters(model).items()}
    return model, train, validation, PromptScores(Engine(model, SETTINGS), train, validation, SETTINGS, ones)


@pytest.mark.parametrize("normalizer", ["sequence", "token", "constant"])
@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_scores_are_those_of_the_public_call(normalizer: str, std: bool, score: str) -> None:
    model, train, validation, scores = scored()
    surrogate = cropi.SurrogateSettings(normalizer, max_completion_length=4, advantage_std=std)
    options = cropi.ScorerOptions("reference", score)
    expected = cropi.influence(model, train, validation, surrogate=surrogate, options=options).values
    found = scores.values(Kind(normalizer, std, std, score, False))
    # transformers' norms are in float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    assert (found[-1] == 0).all()


def test_norms_gain_and_preconditioned_scores() -> None:
    model, train, _, scores = scored()
    gradient = prompt_gradient(model, train[2], replace(SETTINGS, normalizer="token")).gradients
    norms_NV = scores.values(Kind("token", True, True, "norm", False))
    assert norms_NV[2, 0] == pytest.approx(inner(gradient, gradient) ** 0.5)
    p_N = np.array([group.pass_rate for group in train])
    cosine, gain = (scores.values(Kind("sequence", True, True, s, False)) for s in ("cosine", "gain"))
    np.testing.assert_allclose(gain, cosine * np.sqrt(p_N * (1 - p_N))[:, None])
    # a diagonal of fours: products and squared lengths are fourfold, cosines stay
    plain, adam = (scores.values(Kind("constant", True, False, "dot", a)) for a in (False, True))
    np.testing.assert_allclose(adam, 4 * plain)
    np.testing.assert_allclose(scores.values(Kind("sequence", True, True, "cosine", True)), cosine)
    assert len({kind.name for kind in kinds()}) == len(kinds())


def test_the_mean_gradient_counts_groups_without_signal() -> None:
    model = tiny_llama()
    first, second, third = groups(model)
    flat = replace(second, rewards=[0.0] * len(second.rewards))
    found = mean_gradient(Engine(model, SETTINGS), [first, flat, third], SETTINGS)
    parts = [prompt_gradient(model, group, SETTINGS).gradients for group in (first, third)]
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, (parts[0][name] + parts[1][name]) / 3)


def test_agreement_and_slope_of_numbers_that_are_known() -> None:
    generator = np.random.default_rng(0)
    predicted = generator.standard_normal(60)
    measured = 2.0 * predicted + 0.5 * generator.standard_normal(60) + 7
    fitted = slope([(predicted, measured)], times=400)
    assert fitted.low < 2.0 < fitted.high
    assert fitted.high - fitted.low < 0.5
    assert fitted.mean == pytest.approx(np.polyfit(predicted, measured, 1)[0])
    # every experiment has an intercept of its own, and weighs by the spread of its predictions
    assert slope([(predicted, measured), (predicted + 5, measured - 100)], times=2).mean == pytest.approx(fitted.mean)
    perfect = rank_agreement([(predicted, np.exp(predicted))], times=50)
    assert (perfect.mean, perfect.low, perfect.high) == pytest.approx((1, 1, 1))
    both = rank_agreement([(predicted, np.exp(predicted)), (predicted, -predicted)], times=50)
    assert (both.mean, both.low, both.high) == pytest.approx((0, 0, 0))
    nothing = rank_agreement([(predicted, generator.standard_normal(60))], times=200)
    assert nothing.low < 0 < nothing.high
    assert np.isnan(rank_agreement([(np.zeros(60), measured)], times=5).low)
