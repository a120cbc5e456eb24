"""Influence read in a backward pass against autograd, one row at a time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.gradients.architectures import BUILDERS, VOCABULARY, tiny
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cropi.errors import PolicyError
from cropi.gradients.direction import DirectionSketch
from cropi.gradients.layer_taps import matrix_parameters
from cropi.gradients.training_influence import Direction, LowRank, Reader

SIDES = ("left", "right")


def rows_of_tokens(lengths: tuple[int, ...] = (9, 5, 2, 7), side: str = "right") -> tuple[Tensor, Tensor]:
    """Random ids and mask, padded on one side."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    places = torch.arange(max(lengths)).expand(len(lengths), -1)
    sizes = torch.tensor(lengths)[:, None]
    mask = places < sizes if side == "right" else places >= max(lengths) - sizes
    return ids * mask, mask.long()


def loss_of_rows(model: nn.Module, ids: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """sum_b w_b sum_t log pi(x_t), over real tokens."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    chosen = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (chosen * mask[:, 1:] * mask[:, :-1] * weights[:, None]).sum()


WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 1.5])


def directions_for(model: nn.Module, count: int = 2, rank: int | None = None) -> list[Direction]:
    """Random directions over all trainable parameters; of full rank unless `rank` says otherwise."""
    generator = torch.Generator().manual_seed(1)

    def drawn(parameter: Tensor) -> LowRank | Tensor:
        if parameter.dim() == 1:
            return torch.randn(parameter.shape, generator=generator)
        full = torch.randn(parameter.shape, generator=generator)
        if rank is None:
            return LowRank(torch.eye(len(full)), full)
        return LowRank(torch.randn(len(full), rank, generator=generator), full[:rank])

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [{name: drawn(p) for name, p in named} for _ in range(count)]


def inner(direction: Direction, gradients: dict[str, Tensor]) -> float:
    total = 0.0
    for name, gradient in gradients.items():
        part = direction[name]
        dense = part.left @ part.right if isinstance(part, LowRank) else part
        total += float((dense.double() * gradient.double()).sum())
    return total


def expected(model: nn.Module, directions: list[Direction], ids: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """By autograd, one row at a time."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = []
    for n in range(len(ids)):
        loss = loss_of_rows(model, ids[n : n + 1], mask[n : n + 1], weights[n : n + 1])
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        own = {name: g for name, g in zip(named, grads, strict=True) if g is not None}
        found.append([inner(direction, own) for direction in directions])
    return torch.tensor(found)


def read(model: nn.Module, directions: list[Direction], ids: Tensor, mask: Tensor, weights: Tensor = WEIGHTS) -> Tensor:
    reader = Reader(model, directions)
    with reader.reading(torch.arange(len(ids)), model):
        loss_of_rows(model, ids, mask, weights).backward()
    assert reader.exclude_unfaithful() == ([], pytest.approx(1))
    rows, values = reader.take()
    assert rows.tolist() == list(range(len(ids)))
    return values


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", BUILDERS)
def test_it_equals_autograd_row_by_row(name: str, side: str) -> None:
    model = BUILDERS[name]().float()
    directions = directions_for(model)
    ids, mask = rows_of_tokens(side=side)
    found = read(model, directions, ids, mask)
    assert gap(found, expected(model, directions, ids, mask, WEIGHTS)) < 1e-5


def test_low_ranks_of_several_directions_are_told_apart() -> None:
    model = tiny("llama_tied").float()
    directions = directions_for(model, 3, rank=2)
    directions[1] = {name: part for name, part in directions[1].items() if "mlp" in name}  # others are 0 there
    ids, mask = rows_of_tokens()
    missing = {name: torch.zeros(p.shape) for name, p in model.named_parameters() if "mlp" not in name}
    whole = [directions[0], directions[1] | missing, directions[2]]
    found = read(model, directions, ids, mask)
    assert gap(found, expected(model, whole, ids, mask, WEIGHTS)) < 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    model = tiny("qwen3").float()
    directions = directions_for(model)
    ids, mask = rows_of_tokens()
    plain = read(model, directions, ids, mask)
    model.zero_grad()
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(read(model, directions, ids, mask), plain, rtol=1e-5, atol=1e-6)


def test_micro_batches_and_repeated_rows_add_up() -> None:
    model = tiny("llama").float()
    directions = directions_for(model)
    ids, mask = rows_of_tokens()
    whole = read(model, directions, ids, mask)
    reader = Reader(model, directions)
    for part in (torch.tensor([2, 0]), torch.tensor([1, 3])):
        with reader.reading(part):
            loss_of_rows(model, ids[part], mask[part], WEIGHTS[part]).backward()
    rows, values = reader.take()
    assert rows.tolist() == [2, 0, 1, 3]
    torch.testing.assert_close(values, whole[rows], rtol=1e-5, atol=1e-6)
    assert len(reader.take()[0]) == 0


def test_training_is_the_same_with_and_without_it() -> None:
    """Gradients, and the random state, bit for bit."""
    ids, mask = rows_of_tokens()
    gradients = []
    for reads in (False, True):
        model = tiny("gemma2").float()
        reader = Reader(model, directions_for(model))
        torch.manual_seed(3)
        if reads:
            with reader.reading(torch.arange(len(ids))):
                loss_of_rows(model, ids, mask, WEIGHTS).backward()
        else:
            loss_of_rows(model, ids, mask, WEIGHTS).backward()
        gradients.append([*(p.grad for p in model.parameters()), torch.rand(1)])
        assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 1024.0)])
def test_autocast_is_near_and_what_is_read_has_the_scale_of_the_loss(dtype: torch.dtype, scale: float) -> None:
    model = tiny("llama").float()
    directions = directions_for(model)
    ids, mask = rows_of_tokens()
    exact = expected(model, directions, ids, mask, WEIGHTS)
    reader = Reader(model, directions)
    with reader.reading(torch.arange(4), model), torch.autocast("cpu", dtype):
        loss = loss_of_rows(model, ids, mask, WEIGHTS)
        (loss * scale).backward()
    found = reader.take()[1] / scale
    assert reader.exclude_unfaithful() == ([], pytest.approx(1))
    assert gap(found, exact) < 0.05
    assert found.dtype == torch.float32


def test_a_gradient_that_overflowed_is_no_check() -> None:
    """The first steps in float16 do, until the scale is small enough."""
    model = tiny("llama").float()
    ids, mask = rows_of_tokens()
    reader = Reader(model, directions_for(model))
    for scale in (1e38, 1.0):
        with reader.reading(torch.arange(4), model):
            (loss_of_rows(model, ids, mask, WEIGHTS) * scale).backward()
        wrong, share = reader.exclude_unfaithful()
        assert wrong == []
        assert share == pytest.approx(1 if scale == 1 else float("nan"), nan_ok=True)


class InPlace(nn.Module):
    """Writes into a layer's output, reads one weight directly, and calls one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.direct = (nn.Linear(4, 4) for _ in range(3))
        self.flat = nn.Linear(4, 4, bias=False)

    def forward(self, read_BTI: Tensor) -> Tensor:
        out = self.first(read_BTI)
        out.mul_(2).add_(1)
        out = self.twice(torch.tanh(self.twice(out)))
        out = out + self.flat(out.reshape(-1, 4)).reshape(out.shape)
        return nn.functional.linear(out, self.direct.weight) + self.direct(out)


def test_what_cannot_be_read_is_found_and_told() -> None:
    torch.manual_seed(0)
    model, read_BTI = InPlace(), torch.randn(3, 5, 4)
    names = [name for name, _ in model.named_parameters()]
    directions = directions_for(model, 1)
    reader = Reader(model, directions)

    def passed() -> None:
        with reader.reading(torch.arange(3), model):
            model(read_BTI).square().sum().backward()

    passed()
    wrong, read_share = reader.exclude_unfaithful()
    assert wrong == ["direct.weight"]
    squares = {name: float(p.grad.square().sum()) for name, p in model.named_parameters()}
    whole = {"first.weight", "first.bias", "twice.weight", "twice.bias", "direct.bias"}
    assert set(names) - whole == {"direct.weight", "flat.weight"}
    share = sum(squares[name] for name in whole) / sum(squares.values())
    assert read_share == pytest.approx(share, rel=1e-5)
    assert not any(p._backward_hooks for p in model.parameters())
    reader.take()
    passed()  # now without the layer of the direct weight
    total = reader.take()[1].sum()
    known = {name: p.grad / 2 for name, p in model.named_parameters() if name in whole - {"direct.bias"}}
    assert float(total) == pytest.approx(inner(directions[0], known), rel=1e-4)


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(PolicyError, match="compiled model ignores taps"):
        Reader(torch.compile(nn.Linear(2, 2)), [{}])


def counted(model: nn.Module, around: Any) -> int:
    """Operations of matrix products in a forward and backward pass over 4 rows of 50 tokens."""
    inputs = torch.randn(4, 50, 12, requires_grad=True)
    with FlopCounterMode(display=False) as counter, around:
        model(inputs).square().sum().backward()
    return counter.get_total_flops()


def test_what_reading_costs_is_what_torch_counts() -> None:
    model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Linear(20, 16, bias=False))
    alone, tokens, own = counted(model, nullcontext()), 4 * 50, matrix_parameters(model)
    assert alone == 3 * 2 * tokens * own
    reader = Reader(model, directions_for(model, count=3, rank=2))
    read = counted(model, reader.reading(torch.arange(4))) - alone
    assert reader.products == 3 * 2 * (32 + 36)
    assert read == 2 * (tokens * reader.products + 4 * 2 * 6 * 3)  # and sums over the ranks of a direction
    sketch = DirectionSketch(model, rank=2, parts=1)
    sketched = counted(model, sketch.sketching(torch.zeros(4, dtype=torch.int64))) - alone
    assert sketched == 2 * tokens * sketch.products
    assert sketch.products == (5 + 11) * (32 + 36)
