"""The sketched direction of validation rows against gradients formed whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from tests.gradients.architectures import BUILDERS, tiny
from tests.gradients.test_reading import WEIGHTS, loss_of_rows, rows_of_tokens
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cropi.errors import PolicyError
from cropi.gradients.direction import DirectionSketch, backward_to_embeddings, deterministic, inner
from cropi.gradients.training_influence import Direction, LowRank
from cropi.report.costs import DIRECTION, GRADIENT

PARTS = torch.tensor([0, 1, 1, 0])


def dense(direction: Direction) -> dict[str, Tensor]:
    return {name: p.left @ p.right if isinstance(p, LowRank) else p for name, p in direction.items()}


def sketch_of(model: nn.Module, rank: int, *, micro_batches: Any = (slice(None),)) -> DirectionSketch:
    ids, mask = rows_of_tokens()
    sketch = DirectionSketch(model, rank)
    for part in micro_batches:
        with backward_to_embeddings(model) as backward, sketch.sketching(PARTS[part]):
            backward(loss_of_rows(model, ids[part], mask[part], WEIGHTS[part]))
    return sketch


def true_gradients(model: nn.Module) -> list[dict[str, Tensor]]:
    """Of the two parts, by autograd."""
    ids, mask = rows_of_tokens()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = []
    for part in range(2):
        loss = loss_of_rows(model, ids[part == PARTS], mask[part == PARTS], WEIGHTS[part == PARTS])
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        found.append(
            {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads, strict=True)}
        )
    return found


@pytest.mark.parametrize("name", BUILDERS)
def test_a_sketch_of_full_rank_is_the_gradient(name: str) -> None:
    model = BUILDERS[name]().float()
    for found, wanted in zip(sketch_of(model, 64).directions(), true_gradients(model), strict=True):
        whole = dense(found)
        assert whole.keys() == wanted.keys()
        scale = sum(float(g.square().sum()) for g in wanted.values()) ** 0.5
        gap = sum(float((whole[name] - g).square().sum()) for name, g in wanted.items()) ** 0.5
        assert gap < 1e-4 * scale


def test_embeddings_beside_those_of_the_tokens_are_part_of_the_direction() -> None:
    """Such as those of layers in Gemma 3n: a backward pass to the tokens' own would leave them out."""
    model = tiny("llama").float()
    model.beside = nn.Embedding(model.config.vocab_size, model.config.hidden_size)
    model.model.embed_tokens.register_forward_hook(lambda module, ids, output: output + model.beside(ids[0]))
    for found, wanted in zip(sketch_of(model, 64).directions(), true_gradients(model), strict=True):
        torch.testing.assert_close(dense(found)["beside.weight"], wanted["beside.weight"], rtol=1e-3, atol=1e-4)


def test_a_pass_stays_on_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one that has no values, and may not be mixed with the CPU. It has no autocast."""
    monkeypatch.setattr("torch.autocast", lambda *_, **__: nullcontext())
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny("llama").config)
    sketch = DirectionSketch(model, 2)
    with backward_to_embeddings(model) as backward, sketch.sketching(PARTS):
        backward(model(input_ids=torch.ones(4, 6, dtype=torch.long, device="meta")).logits.square().sum())
    assert {sums.device.type for sums in sketch.sums().values()} == {"meta"}


def test_a_pass_computes_no_weight_gradient() -> None:
    """So that its products of linear layers are those of two forward passes; of training's passes, three."""
    model = tiny("llama").float()
    ids, mask = rows_of_tokens()

    def products(differentiate: Callable[[Tensor], None]) -> float:
        with FlopCounterMode(display=False) as counter:
            differentiate(loss_of_rows(model, ids, mask, WEIGHTS))
        return counter.get_flop_counts()["Global"][torch.ops.aten.mm]

    forward = products(lambda loss: None)
    with backward_to_embeddings(model) as backward:
        assert products(backward) == DIRECTION * forward
    assert products(lambda loss: loss.backward()) == GRADIENT * forward


def test_micro_batches_add_up_and_scaling_forgets() -> None:
    model = tiny("llama").float()
    whole = sketch_of(model, 3).sums()
    parts = sketch_of(model, 3, micro_batches=(slice(0, 1), slice(1, 4)))
    parts.scale(0.5)
    for name, sums in parts.sums().items():
        torch.testing.assert_close(2 * sums, whole[name], rtol=1e-4, atol=1e-4)


def test_a_low_rank_is_near_the_best_of_that_rank() -> None:
    """A gradient whose singular values fall like 1, 1/4, 1/16, ...: rank 2 leaves little."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 30, bias=False)
    left, right = (torch.linalg.qr(torch.randn(n, 20))[0] for n in (30, 24))
    values = 0.25 ** torch.arange(20.0)
    sketch = DirectionSketch(layer, rank=2)
    read = (right * values).T[None].requires_grad_()  # token t: a = s_t v_t and g = u_t
    with sketch.sketching(torch.tensor([0])):
        (layer(read) * left.T[None]).sum().backward()
    (found, nothing) = sketch.directions()
    gradient = (left * values) @ right.T
    best = float(values[2:].norm())
    assert best <= float((dense(found)["weight"] - gradient).norm()) < 2 * best
    assert float(dense(nothing)["weight"].norm()) == 0


def test_the_pass_touches_nothing() -> None:
    model = tiny("qwen3").float().train()
    ids, mask = rows_of_tokens()
    loss_of_rows(model, ids, mask, WEIGHTS).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    fired = []
    hooks = [p.register_hook(lambda g: fired.append(g)) for p in model.parameters()]
    state = torch.get_rng_state()
    sketch_of(model, 4)
    assert fired == []
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())
    for hook in hooks:
        hook.remove()


def test_checkpointing_keeps_it_and_reentrant_checkpointing_is_refused() -> None:
    model = tiny("llama").float()
    plain = sketch_of(model, 3).sums()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, sums in sketch_of(model, 3).sums().items():
        torch.testing.assert_close(sums, plain[name], rtol=1e-4, atol=1e-5)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(PolicyError, match="reentrant"):
        sketch_of(model, 3)


def test_dropout_is_off_while_checkpointing_stays_on() -> None:
    model = tiny("llama", attention_dropout=0.5).float().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with deterministic(model):
        first, second = (sketch_of(model, 3).sums() for _ in range(2))
        assert model.model.layers[0].training
        assert not model.model.layers[0].self_attn.training
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert model.model.layers[0].self_attn.training


def test_inner_products_of_directions_are_those_of_matrices() -> None:
    model = tiny("llama_tied").float()
    first, second = sketch_of(model, 3).directions()
    a, b = dense(first), dense(second)
    assert inner(first, second) == pytest.approx(sum(float((a[n] * b[n]).sum()) for n in a), rel=1e-4)
