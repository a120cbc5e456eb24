"""Influence read in a backward pass against autograd, one sequence at a time, with directions of full rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.gradients.architectures import BUILDERS, VOCABULARY
from tests.gradients.test_model_families import text, with_lora
from torch import Tensor

from cropi.errors import PolicyError
from cropi.gradients.direction import Direction, DirectionSketch
from cropi.gradients.reading import Reader

MODELS: dict[str, Callable[[], Any]] = {
    name: BUILDERS[name] for name in ("llama", "llama_tied", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_neox")
} | {
    "llama, LoRA": lambda: BUILDERS["llama_lora"]().float(),
    "granite": text("Granite", logits_scaling=8.0, embedding_multiplier=3.0, attention_multiplier=0.3),
    "gemma3, LoRA": lambda: with_lora(BUILDERS["gemma3"]()),
    "qwen2, LoRA": lambda: with_lora(BUILDERS["qwen2"]()),
}
PROMPT, LENGTHS, WEIGHTS = 3, [9, 4, 6], [1.0, -0.7, 0.4]


def rows_of_tokens(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def loss_of(model: Any, rows: list[Tensor], weights: list[float], left: bool = False) -> Tensor:
    """-sum of weighted log-probabilities of the tokens after the prompt, over padded rows."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    begins = [width - len(row) if left else 0 for row in rows]
    for b, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        ids[b, begin : begin + len(row)], mask[b, begin : begin + len(row)] = row, 1
    positions = (mask.cumsum(1) - 1).clamp_min(0).long()
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    table = out.logits.log_softmax(-1)
    terms = [
        weight * table[b, begin + PROMPT - 1 : begin + len(row) - 1].gather(1, row[PROMPT:, None]).sum()
        for b, (row, begin, weight) in enumerate(zip(rows, begins, weights, strict=True))
    ]
    return -torch.stack(terms).sum()


def gradients(model: Any, row: Tensor, weight: float) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss_of(model, [row], [weight]), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def whole(model: Any, seed: int = 5) -> dict[str, Tensor]:
    """Two different halves: gradients of other sequences."""
    one, two = (gradients(model, row, 1.0) for row in rows_of_tokens(seed)[:2])
    return {name: torch.stack([one[name], two[name]]) for name in one}


def expected(model: Any, target: dict[str, Tensor], names: Any) -> Tensor:
    found = [gradients(model, row, weight) for row, weight in zip(rows_of_tokens(), WEIGHTS, strict=True)]
    return torch.stack(
        [sum((target[n].double() * g[n].double()).flatten(1).sum(1) for n in names) for g in found]  # type: ignore[misc]
    )


def close(found: Tensor, right: Tensor, tolerance: float = 1e-5) -> bool:
    return float((found - right).abs().max()) < tolerance * float(right.abs().max())


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_autograd(name: str, left: bool) -> None:
    model = MODELS[name]().float()
    target = whole(model)
    reader = Reader(model, {"a": Direction.whole(target), "b": Direction.whole({n: -g for n, g in target.items()})})
    assert not reader.unread
    with reader.reading([2, 0, 1]):
        loss_of(model, rows_of_tokens(), WEIGHTS, left).backward()
    coverage = reader.measure()
    found = reader.take()
    right = expected(model, target, reader.read)
    assert close(found[[2, 0, 1], 0], right)
    assert torch.allclose(found[:, 0], -found[:, 1])
    assert coverage.share == pytest.approx(1.0, abs=1e-5)
    assert coverage.factor == pytest.approx(1.0, abs=1e-4)
    assert not len(reader.take())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    model = MODELS["qwen3"]().float()
    target = whole(model)
    right = expected(model, target, target)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    reader = Reader(model, {"a": Direction.whole(target)})
    for row in range(3):  # micro-batches of one
        with reader.reading([row], scale=2.0):
            (2 * loss_of(model, [rows_of_tokens()[row]], [WEIGHTS[row]])).backward()
    assert close(reader.take()[:, 0], right)


def test_autocast() -> None:
    model = MODELS["llama"]().float()
    target = whole(model)
    reader = Reader(model, {"a": Direction.whole(target)})
    with reader.reading(range(3)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, rows_of_tokens(), WEIGHTS)
        loss.backward()
    assert close(reader.take()[:, 0], expected(model, target, target), 0.05)


def test_misuse_is_an_error() -> None:
    model = MODELS["llama"]().float()
    reader = Reader(model, {"a": Direction.whole(whole(model))})
    with pytest.raises(RuntimeError, match="inside the block"), reader.reading(range(3)):
        loss = loss_of(model, rows_of_tokens(), WEIGHTS)
    with pytest.raises(RuntimeError, match="must enclose the backward"):
        loss.backward()
    with pytest.raises(ValueError, match="row numbers"), reader.reading([0]):
        loss_of(model, rows_of_tokens(), WEIGHTS)
    with pytest.raises(PolicyError, match=r"torch\.compile"):
        Reader(torch.compile(model), {})


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", ["llama_tied", "qwen2, LoRA"])
def test_direction_is_the_mean_gradient(name: str, checkpointing: bool | None) -> None:
    model = MODELS[name]().float()
    rows = rows_of_tokens(7)
    each = [gradients(model, row, 1.0) for row in rows]
    if checkpointing is not None:
        model.train().gradient_checkpointing_enable({"use_reentrant": checkpointing})
    sketch = DirectionSketch(model, rank=64, width=64)
    sketch.begin(3)
    state = torch.get_rng_state()
    with sketch.directing([0, 1, 2], [0, 1, 0]) as backward:
        backward(loss_of(sketch.model, rows, [1.0] * 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    found = sketch.direction()
    for n in each[0]:
        mean = sum(g[n] for g in each) / 3  # type: ignore[misc]
        half = 2 * each[1][n] / 3
        got = found.vectors[n] if n in found.vectors else found.left[n] @ found.halves[n] @ found.right[n]
        assert float((got.mean(0) - mean).norm()) < 1e-4 * float(mean.norm()), n
        if n in found.vectors:
            assert float((got[1] - half).norm()) < 1e-4 * float(half.norm()), n
    loo = sketch.leave_one_out()
    for m in range(3):
        others = sum((each[m][n] * each[j][n]).sum() for j in range(3) if j != m for n in each[0]) / 2
        assert float(loo[m].mean()) == pytest.approx(float(others), rel=1e-3)
