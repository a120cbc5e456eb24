"""The engine's gradient against three others, for every architecture and normaliser: reverse-mode autograd (the
reference estimator, one trajectory at a time), forward-mode derivatives of the surrogate written out in loops, and its
finite differences.

With weights in float64, transformers still computes in float32 what this table says, which bounds the agreement as the
policy comes. `eager` and `sdpa` are its attention implementations; the engine's own keeps float64. Rotary angles are
float32 everywhere, but they are constants and the same for everybody.

| architecture          | norms   | softmax of eager | softmax of sdpa | as it comes | casts taken out |
|-----------------------|---------|------------------|-----------------|-------------|-----------------|
| Llama, Mistral, Qwen2 | float32 | float32          | float64         | 1e-5        | 1e-10           |
| Qwen3, Gemma3         | float32 | float32          | float64         | 1e-5        | 1e-10           |
| Gemma2                | float32 | float32          | not available   | 1e-5        | 1e-10           |
| GPT-NeoX              | float64 | float32          | float64         | 1e-10       | 1e-10           |
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.gradients.architectures import (
    BUILDERS,
    GROUPS,
    NORMALIZERS,
    SETTINGS,
    VOCABULARY,
    Gradients,
    dense_gradients,
    own_attention,
    relative_gap,
    segments,
    settings_of,
    tiny,
    without_casts,
)
from torch import Tensor
from torch.autograd import forward_ad

from cropi.gradients import head
from cropi.gradients.engine import Engine
from cropi.gradients.exact import DenseReader
from cropi.gradients.groups import Group
from cropi.gradients.reference import prompt_gradient, trainable_parameters

FLOAT64_THROUGHOUT = {"gpt_neox"}
STEPS = {"float64": 1e-4, "float32": 2e-3}


@pytest.fixture(params=BUILDERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def engine_gradients(model: Any) -> dict[str, Gradients]:
    """By normaliser, the sum over all groups, in one pack."""
    return {normalizer: dense_gradients(model, settings=settings_of(normalizer)) for normalizer in NORMALIZERS}


def autograd_gradients(model: Any, normalizer: str) -> Gradients:
    parts = [prompt_gradient(model, g, settings_of(normalizer), batch_tokens=1).gradients for g in GROUPS]
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def ratio_sums(model: Any, behaviour: list[list[list[float]]]) -> list[list[Tensor]]:
    """sum_t rho_{k,t} of every trajectory, one at a time, from the definition."""
    sums = []
    for group, betas in zip(GROUPS, behaviour, strict=True):
        sums.append([])
        for completion, beta in zip(group.completions, betas, strict=True):
            ids = torch.tensor([group.prompt_ids + completion])
            logits = model(input_ids=ids, use_cache=False).logits[0] / SETTINGS.temperature
            logprobs = logits - logits.exp().sum(dim=-1, keepdim=True).log()
            places = range(len(group.prompt_ids) - 1, len(ids[0]) - 1)
            sums[-1].append(sum((logprobs[s, ids[0, s + 1]] - b).exp() for s, b in zip(places, beta, strict=True)))
    return sums


def surrogate(sums: list[list[Tensor]], normalizer: str) -> Any:
    """sum over groups of sum_k (A_k / Z_k) sum_t rho_{k,t}, from the definitions of A and Z."""
    total: Any = 0.0
    for group, sums_K in zip(GROUPS, sums, strict=True):
        count, mean = len(group.rewards), sum(group.rewards) / len(group.rewards)
        deviation = (sum((reward - mean) ** 2 for reward in group.rewards) / (count - 1)) ** 0.5 + 1e-4
        divisor = deviation if settings_of(normalizer).advantage_std else 1.0
        for k, completion in enumerate(group.completions):
            z = {
                "sequence": count * len(completion),
                "token": sum(map(len, group.completions)),
                "constant": count * SETTINGS.max_completion_length,
            }[normalizer]
            total = total + (group.rewards[k] - mean) / divisor / z * sums_K[k]
    return total


def own_behaviour(model: Any) -> list[list[list[float]]]:
    """Behaviour log-probs of all groups: an on-policy one has the policy's own."""

    def logprobs(group: Group, completion: list[int]) -> list[float]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([group.prompt_ids + completion]), use_cache=False).logits[0]
        table = torch.log_softmax(logits / SETTINGS.temperature, dim=-1)[len(group.prompt_ids) - 1 :]
        return [float(row[token]) for row, token in zip(table[:-1], completion, strict=True)]

    return [
        [logprobs(group, completion) for completion in group.completions]
        if group.behaviour_logprobs is None
        else group.behaviour_logprobs
        for group in GROUPS
    ]


def random_direction(gradients: Gradients, seed: int) -> Gradients:
    """Random in every parameter, and no longer in a large one than in a small one.

    Half of it lies along the gradient, so that no chance cancellation between parameters hides a mistake or blows up a
    relative error.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(g.shape, dtype=g.dtype, generator=generator) for name, g in gradients.items()}
    return {name: noise[name] / noise[name].norm() + g / g.norm() for name, g in gradients.items()}


def forward_mode(model: Any, direction: Gradients, behaviour: list[list[list[float]]]) -> dict[str, float]:
    """Derivatives of the surrogates along a direction: no backward pass, no packing, no shared prompt."""
    originals = {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}
    with forward_ad.dual_level(), torch.no_grad():
        duals = {name: forward_ad.make_dual(tensor, direction[name]) for name, tensor in originals.items()}
        sums = torch.func.functional_call(_Sums(model, behaviour), {f"model.{n}": dual for n, dual in duals.items()})
        return {normalizer: float(_tangent(surrogate(sums, normalizer))) for normalizer in NORMALIZERS}


class _Sums(torch.nn.Module):
    def __init__(self, model: Any, behaviour: list[list[list[float]]]) -> None:
        super().__init__()
        self.model, self._behaviour = model, behaviour

    def forward(self) -> list[list[Tensor]]:
        return ratio_sums(self.model, self._behaviour)


def _tangent(dual: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(dual).tangent
    assert tangent is not None
    return tangent


def finite_differences(
    model: Any, direction: Gradients, behaviour: list[list[list[float]]], step: float
) -> dict[str, float]:
    """Central differences of sixth order: the rounding of float32 casts forbids small steps."""
    values: dict[int, list[list[Tensor]]] = {}
    parameters = trainable_parameters(model)
    originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for steps in (-3, -2, -1, 1, 2, 3):
            for name, parameter in parameters.items():
                parameter.copy_(originals[name] + steps * step * direction[name])
            values[steps] = ratio_sums(model, behaviour)
        for name, parameter in parameters.items():
            parameter.copy_(originals[name])
    found = {}
    for normalizer in NORMALIZERS:
        at = {steps: float(surrogate(sums, normalizer)) for steps, sums in values.items()}
        found[normalizer] = (45 * (at[1] - at[-1]) - 9 * (at[2] - at[-2]) + at[3] - at[-3]) / (60 * step)
    return found


def check_all(model: Any, tolerance: float, numeric_tolerance: float, step: float) -> None:
    found = engine_gradients(model)
    behaviour = own_behaviour(model)
    direction = random_direction(found["sequence"], seed=7)
    forward = forward_mode(model, direction, behaviour)
    numeric = finite_differences(model, direction, behaviour, step)
    for normalizer in NORMALIZERS:
        gradients, oracle = found[normalizer], autograd_gradients(model, normalizer)
        assert list(gradients) == list(oracle)
        for name, gradient in gradients.items():
            assert oracle[name].norm() > 1e-4, name
            assert relative_gap(gradient, oracle[name]) < tolerance, (normalizer, name)
        along = sum(float((gradient * direction[name]).sum()) for name, gradient in gradients.items())
        assert along == pytest.approx(forward[normalizer], rel=tolerance), normalizer
        assert along == pytest.approx(numeric[normalizer], rel=numeric_tolerance), normalizer


def test_gradients_without_casts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BUILDERS[name]()
    with without_casts(model, monkeypatch):
        check_all(model, tolerance=1e-10, numeric_tolerance=1e-5, step=STEPS["float64"])


def test_gradients_of_the_policy_as_it_comes(name: str) -> None:
    model = BUILDERS[name]()
    if name in FLOAT64_THROUGHOUT:
        own_attention(model)  # but for eager attention's softmax, which the engine has no part in
        check_all(model, tolerance=1e-10, numeric_tolerance=1e-5, step=STEPS["float64"])
    else:
        model.set_attn_implementation("eager")  # what can be differentiated forward
        check_all(model, tolerance=1e-5, numeric_tolerance=1e-4, step=STEPS["float32"])


def test_sdpa_and_the_packed_attention_agree_in_float64() -> None:
    model = tiny("gpt_neox")
    assert model.config._attn_implementation == "sdpa"
    found, oracle = engine_gradients(model)["sequence"], autograd_gradients(model, "sequence")
    assert max(relative_gap(found[name], oracle[name]) for name in found) < 1e-10


def test_ratios_and_their_effective_share_are_those_of_autograd() -> None:
    model = tiny("gpt_neox")
    work = Engine(model, SETTINGS, 1000).run(segments(), DenseReader(trainable_parameters(model), set()))
    shares = [prompt_gradient(model, group, SETTINGS).ratios.effective_share for group in GROUPS]
    assert [work.of(row).effective_share for row in range(len(GROUPS))] == pytest.approx(shares, rel=1e-12)
    assert shares[0] < 0.9
    assert shares[2] == 1.0


def test_a_prompt_token_without_gradient_by_padding_idx() -> None:
    """torch gives the padding row of an embedding no gradient; a tied head still does."""
    for tied in (True, False):
        model = tiny("gpt_neox", tie_word_embeddings=tied)
        embedding = model.get_input_embeddings()
        embedding.padding_idx = 5
        group = Group("p", [7, 5, 5, 9], [[5, 8], [6, 5, 4]], [1.0, 0.0], None)
        found, oracle = dense_gradients(model, [group]), prompt_gradient(model, group, SETTINGS).gradients
        for name, gradient in found.items():
            assert relative_gap(gradient, oracle[name]) < 1e-10, name
        assert bool(found["gpt_neox.embed_in.weight"][5].any()) == tied


def test_vocabulary_head_in_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt_neox")
    whole = engine_gradients(model)["sequence"]
    monkeypatch.setitem(head.LOGITS_AT_ONCE, "cpu", 3 * VOCABULARY)
    parts = engine_gradients(model)["sequence"]
    assert max(relative_gap(parts[name], whole[name]) for name in whole) < 1e-12


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_in_bfloat16_the_engine_is_as_close_to_the_truth_as_autograd(name: str) -> None:
    model = BUILDERS[name]().bfloat16()
    model.set_attn_implementation("eager")  # transformers < 5.18 takes sdpa for gemma2, which leaves out its soft cap
    found, oracle = engine_gradients(model)["sequence"], autograd_gradients(model, "sequence")
    truth = autograd_gradients(model.double(), "sequence")

    def error(gradients: Gradients) -> float:
        return sum(float((gradients[n].double() - g).norm() ** 2) / float(g.norm() ** 2) for n, g in truth.items())

    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert error(found) < 1.5 * error(oracle)
    assert max(relative_gap(found[n].double(), g) for n, g in truth.items()) < 0.15


def test_nothing_depends_on_the_callers_grad_mode_or_autocast() -> None:
    model = tiny("gpt_neox").float()
    outside = engine_gradients(model)["sequence"]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = engine_gradients(model)["sequence"]
    assert all(torch.equal(inside[name], gradient) for name, gradient in outside.items())
