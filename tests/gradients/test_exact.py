"""Inner products and norms read off the factors against the same taken from whole gradients."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tests.gradients.architectures import (
    GROUPS,
    SETTINGS,
    VOCABULARY,
    Gradients,
    draw_group,
    random_gradients,
    segments,
    tiny,
    tiny_lora,
    without_casts,
)
from torch import Tensor

from cropi.gradients import head
from cropi.gradients.engine import Engine
from cropi.gradients.exact import ExactReader
from cropi.gradients.groups import Group
from cropi.gradients.reference import prompt_gradient, trainable_parameters

SHORT = [draw_group(1, [2, 3], seed=21), draw_group(2, [1, 1], seed=22)]
"""So few tokens that meeting them one by one is cheaper than forming a gradient."""
LONG = [draw_group(5, [15, 14, 15], seed=23), draw_group(4, [15, 13], seed=24)]

MODELS = {
    "llama": lambda: tiny("llama"),
    "llama_tied": lambda: tiny("llama_tied"),
    "qwen2": lambda: tiny("qwen2"),
    "gpt_neox": lambda: tiny("gpt_neox"),
    "gpt_neox_tied": lambda: tiny("gpt_neox", tie_word_embeddings=True),
    "llama_lora": tiny_lora,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    model = MODELS[request.param]()
    with without_casts(model, monkeypatch):
        return model


def random_directions(model: Any, count: int) -> list[Gradients]:
    return [random_gradients(trainable_parameters(model), seed) for seed in range(count)]


def by_autograd(model: Any, groups: list[Group], directions: list[Gradients]) -> tuple[list[list[float]], list[float]]:
    products, squares = [], []
    for group in groups:
        gradients = prompt_gradient(model, group, SETTINGS, batch_tokens=1).gradients
        products.append([sum(float((g * d[name]).sum()) for name, g in gradients.items()) for d in directions])
        squares.append(sum(float((g * g).sum()) for g in gradients.values()))
    return products, squares


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the linear layers' spans by whether a gradient was formed for them."""
    taken: Counter[str] = Counter()
    meet, meet_by_token = ExactReader._meet, ExactReader._meet_by_token

    def formed(self: ExactReader, name: str, index: int, gradient: Tensor) -> None:
        taken["formed"] += gradient.dim() == 2
        meet(self, name, index, gradient)

    def by_token(self: ExactReader, name: str, inputs: Tensor, grads: Tensor, spans: Any) -> None:
        taken["by token"] += len(spans)
        meet_by_token(self, name, inputs, grads, spans)

    monkeypatch.setattr(ExactReader, "_meet", formed)
    monkeypatch.setattr(ExactReader, "_meet_by_token", by_token)
    return taken


def check(model: Any, groups: list[Group], count: int, norms: bool) -> None:
    directions = random_directions(model, count)
    engine = Engine(model, SETTINGS, 1000)
    products, squares = by_autograd(model, groups, directions)
    # which parameters come in several parts is either told, or all are taken to
    for repeated in (engine.repeated, None) if norms else (engine.repeated,):
        reader = ExactReader(directions, len(groups), norms=norms, repeated=repeated)
        engine.run(segments(groups), reader, divisible=not norms)
        for row in range(len(groups)):
            assert reader.products_NV[row].tolist() == pytest.approx(products[row], rel=1e-9, abs=1e-9)
            assert float(reader.squares_N[row]) == pytest.approx(squares[row] if norms else 0.0, rel=1e-9)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_products_and_norms_are_those_of_whole_gradients(model: Any, count: int, norms: bool) -> None:
    check(model, GROUPS, count, norms)


@pytest.mark.parametrize(
    ("groups", "count", "norms", "expected"),
    [
        (SHORT, 1, True, "by token"), (LONG, 1, True, "formed"), (LONG, 1, False, "by token"),
        (LONG, 3, False, "formed"), (LONG, 3, True, "formed"),
    ],
)  # fmt: skip
def test_both_routes_lead_to_the_same(model, routes, groups, count, norms, expected):
    check(model, groups, count, norms)
    # An adapter's matrices are so small that it is always cheaper to form them.
    if not hasattr(model, "get_base_model"):
        assert routes[expected] >= 0.4 * routes.total() > 0


def test_norm_of_a_tied_weight_counts_both_of_its_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """|G + H|^2 = |G|^2 + 2 <G, H> + |H|^2 of the embedding's and the head's parts: the middle term is not small."""
    model = tiny("llama_tied")
    with without_casts(model, monkeypatch):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == "model.embed_tokens.weight")
        prompt = [5, 6, 7]
        group = Group("p", prompt, [[5, 6, 7, 5], [6, 6, 5]], [1.0, 0.0], None)
        check(model, [group], 1, norms=True)
        whole = by_autograd(model, [group], [])[1][0]
        parts = _squares_of_paths(model, group)
        assert abs(whole - sum(parts)) > 0.01 * whole


def _squares_of_paths(model: Any, group: Group) -> list[float]:
    untied = tiny("llama", seed=0)
    untied.set_attn_implementation(model.config._attn_implementation)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    untied.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()})
    gradients = prompt_gradient(untied, group, SETTINGS).gradients
    return [float((gradients[n] ** 2).sum()) for n in ("model.embed_tokens.weight", "lm_head.weight")]


@pytest.mark.parametrize("count", [1, 3])
def test_norms_do_not_depend_on_the_chunks_of_the_head(model: Any, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Predictions of one group that fall into several chunks of the vocabulary head are one gradient all the same."""
    monkeypatch.setitem(head.LOGITS_AT_ONCE, "cpu", 4 * VOCABULARY)
    check(model, GROUPS, count, norms=True)


@pytest.mark.parametrize("count", [1, 3])
def test_norm_of_a_head_with_bias_in_chunks(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    model = tiny("gpt_neox")
    model.get_output_embeddings().bias = torch.nn.Parameter(torch.randn(VOCABULARY, dtype=torch.float64))
    check(model, GROUPS, count, norms=True)
    monkeypatch.setitem(head.LOGITS_AT_ONCE, "cpu", 4 * VOCABULARY)
    check(model, GROUPS, count, norms=True)


@pytest.mark.parametrize("groups", [SHORT, GROUPS])
def test_norm_of_a_weight_that_two_layers_share(groups: list[Group]) -> None:
    model = tiny("gpt_neox")
    first, second = model.gpt_neox.layers
    second.mlp.dense_h_to_4h.weight = first.mlp.dense_h_to_4h.weight
    second.input_layernorm.weight = first.input_layernorm.weight
    check(model, groups, 2, norms=False)
    check(model, groups, 1, norms=True)


def test_a_norm_of_trajectories_that_stand_apart_is_refused() -> None:
    model = tiny("gpt_neox")
    parts = segments(GROUPS[:1])[0].alone()
    reader = ExactReader(random_directions(model, 1), 1, norms=True)
    with pytest.raises(ValueError, match="one segment"):
        Engine(model, SETTINGS, 1000).run(parts, reader, divisible=False)
