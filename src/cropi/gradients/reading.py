"""Read the influence of each sequence on validation sets from the backward pass that trains the model.

A set's direction at a weight is D = L C R of low rank. For the gradient G = sum_t u_t v_t^T of one sequence's loss,
<G, D> = <sum_t (u_t L)^T (R v_t), C>: r (m + n) multiplications per token, without forming G. What is read is the
gradient of the loss that is differentiated, with its normaliser held fixed. Both G and D are gradients of losses, so a
positive value means that training on the sequence lowers the validation loss.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cropi.gradients.direction import Direction
from cropi.gradients.layer_factors import (
    EMBEDDING,
    NORM,
    TRANSPOSED,
    Layer,
    Watch,
    find_layers,
    input_side,
    normalised,
    parameter_shapes,
    project,
    unwrapped,
    widened,
)

ENOUGH = 0.5
"""Share of the squared gradient norm below which influence is not evidence."""


@dataclass(frozen=True)
class Coverage:
    """How much of the model's gradient the reader sees.

    `share` is 1 - |G - G_read|^2 / |G|^2. `factor` is .grad over what was read: 1 but for clipping or a loss scale.
    `unread` names the trainable parameters that are not or only partly read, and why.
    """

    share: float
    factor: float
    unread: Mapping[str, str]


class _Bases:
    """The directions of all sets, stacked so that one product per layer serves all."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], directions: Mapping[str, Direction]) -> None:
        device = {name: p.device for name, p in model.named_parameters()}
        matrices, vectors = parameter_shapes(model, list(layers))
        sets = list(directions.values())
        self.sets = len(sets)
        self.left: dict[str, Tensor] = {}
        self.right: dict[str, Tensor] = {}
        self.cores: dict[str, Tensor] = {}
        self.vectors: dict[str, Tensor] = {}
        for name, shape in matrices.items():
            known = [d.halves[name].shape[1:] if name in d.halves else (0, 0) for d in sets]
            p, q = (max(size) for size in zip(*known, strict=True))
            if not p:
                continue
            left, right = torch.zeros(shape[0], len(sets), p), torch.zeros(shape[1], len(sets), q)
            cores = torch.zeros(len(sets), 2, p, q, dtype=torch.float64)
            for s, d in enumerate(sets):
                if name in d.halves:
                    a, b = known[s]
                    left[:, s, :a], right[:, s, :b] = d.left[name].cpu(), d.right[name].cpu().T
                    cores[s, :, :a, :b] = d.halves[name].cpu()
            self.left[name] = left.flatten(1).to(device[name])
            self.right[name] = right.flatten(1).to(device[name])
            self.cores[name] = cores.to(device[name])
        for name, shape in vectors.items():
            if any(name in d.vectors for d in sets):
                none = torch.zeros(2, *shape)
                stacked = torch.stack([d.vectors.get(name, none).cpu() for d in sets])
                self.vectors[name] = stacked.to(device[name], torch.float64)

    def __contains__(self, name: str | None) -> bool:
        return name in self.cores or name in self.vectors


class _Reading:
    """One forward and backward pass: sums over tokens by parameter and sequence."""

    def __init__(self, bases: _Bases, rows: int, skip: Callable[[Layer, str], None]) -> None:
        self.rows, self._bases, self.skip = rows, bases, skip
        self.products: list[tuple[str, Tensor]] = []
        """Parameter, rows x sets x p x q."""
        self.sums: list[tuple[str, Tensor]] = []
        """Parameter, rows x n."""

    def keep(self, layer: Layer, values: Tensor) -> Tensor | None:
        if layer.kind == NORM:
            return values if layer.weight in self._bases.vectors else None
        if layer.weight not in self._bases.cores:
            return None
        assert layer.weight is not None
        basis = self._bases.left if layer.kind in (EMBEDDING, TRANSPOSED) else self._bases.right
        return input_side(layer, values, basis[layer.weight])

    def meet(self, layer: Layer, kept: Tensor | None, grad: Tensor) -> None:
        if layer.bias in self._bases.vectors:
            assert layer.bias is not None
            self.sums.append((layer.bias, widened(grad).sum(1)))
        if kept is None or layer.weight is None:
            return
        if layer.kind == NORM:
            product = normalised(layer.module, kept).mul_(widened(grad))
            self.sums.append((layer.weight, product.sum(1)))
            return
        from_input = layer.kind in (EMBEDDING, TRANSPOSED)
        met = project(grad, (self._bases.right if from_input else self._bases.left)[layer.weight])
        left, right = (kept, met) if from_input else (met, kept)
        shape = (self.rows, left.shape[1], self._bases.sets, -1)
        left, right = left.view(shape).permute(0, 2, 3, 1), right.view(shape).transpose(1, 2)
        self.products.append((layer.weight, left.to(right.dtype) @ right))

    def values(self) -> Tensor:
        """Return rows x sets x 2, float64."""
        total: Any = torch.zeros(self.rows, self._bases.sets, 2, dtype=torch.float64)
        for names, stacked in _stacked(self.products):
            cores = torch.stack([self._bases.cores[name] for name in names])
            total = total + torch.einsum("nbspq,nshpq->bsh", stacked.double(), cores).cpu()
        for names, stacked in _stacked(self.sums):
            vectors = torch.stack([self._bases.vectors[name] for name in names])
            total = total + torch.einsum("nbi,nshi->bsh", stacked.double(), vectors).cpu()
        return total


def _stacked(found: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    groups = defaultdict[Any, list[tuple[str, Tensor]]](list)
    for name, tensor in found:
        groups[tensor.shape, tensor.device].append((name, tensor))
    for group in groups.values():
        yield tuple(name for name, _ in group), torch.stack([tensor for _, tensor in group])


class Reader:
    """Reads, for each sequence of a batch, the inner product of its gradient with the direction of each set.

    A layer called several times and a weight shared by layers add up, as their gradients do. Trainable parameters that
    cannot be read count in `unread`. The trained weights' gradients are not changed.
    """

    def __init__(self, model: nn.Module, directions: Mapping[str, Direction]) -> None:
        """Raises PolicyError for a model compiled by torch.compile."""
        self._model = unwrapped(model)
        self._layers, self._unread = find_layers(self._model)
        self._skipped: dict[str, str] = {}
        self._busy = False
        self.share_read: float | None = None
        """Share of the squared gradient norm that is read; None before `measure`."""
        self.turn_to(directions)

    def turn_to(self, directions: Mapping[str, Direction]) -> None:
        """Read against new directions from now on. Drops what was not taken."""
        self.sets = tuple(directions)
        self._bases = _Bases(self._model, self._layers, directions)
        self._watched = [layer for layer in self._layers if layer.weight in self._bases or layer.bias in self._bases]
        self._values = torch.zeros(0, len(self.sets), 2, dtype=torch.float64)
        self._totals: dict[str, Tensor] = {}

    @property
    def read(self) -> frozenset[str]:
        """Names of the parameters that are read."""
        names = {name for layer in self._watched for name in (layer.weight, layer.bias) if name in self._bases}
        return frozenset(name for name in names if name is not None) - set(self._skipped)

    @property
    def unread(self) -> dict[str, str]:
        """Trainable parameters that are not read, and why."""
        trained = {name for name, p in self._model.named_parameters() if p.requires_grad}
        return dict.fromkeys(trained - self.read, "no direction") | self._unread | self._skipped

    @property
    def enough(self) -> bool:
        """Whether at least half of the squared gradient norm is read. False before `measure`."""
        return self.share_read is not None and self.share_read >= ENOUGH

    @contextmanager
    def reading(self, rows: Sequence[int] | Tensor, *, scale: float = 1.0) -> Iterator[None]:
        """Enclose the forward and backward pass of one micro-batch; `rows` numbers its sequences.

        Values of equal numbers add up, also over blocks. `scale` divides what is read: the scale of a GradScaler times
        the number of processes of DistributedDataParallel. Raises RuntimeError if the block saw no backward pass.
        """
        unwrapped(self._model)
        if self._busy:
            raise RuntimeError("reading is under way already: blocks cannot be nested")
        numbers = torch.as_tensor(rows, dtype=torch.long).cpu()
        work = _Reading(self._bases, len(numbers), self._skip)
        watch = Watch(self._model, self._watched, work)
        self._busy = True
        try:
            with watch.hooks():
                yield
        finally:
            self._busy = False
        if not watch.met and self._watched:
            raise RuntimeError("no gradient was read: forward and backward must both run inside the block")
        self._add(numbers, work, scale)

    def _skip(self, layer: Layer, why: str) -> None:
        self._skipped |= {name: f"{layer.path}: {why}" for name in (layer.weight, layer.bias) if name is not None}

    def _add(self, numbers: Tensor, work: _Reading, scale: float) -> None:
        count = max(len(self._values), int(numbers.max()) + 1)
        grown = torch.zeros(count, *self._values.shape[1:], dtype=torch.float64)
        grown[: len(self._values)] = self._values
        self._values = grown.index_add_(0, numbers, work.values() / scale)
        for name, found in [*work.products, *work.sums]:
            total = found.sum(0) / scale
            self._totals[name] = self._totals[name] + total if name in self._totals else total

    def take(self) -> Tensor:
        """Return the values against each half of each direction, (largest row + 1) x sets x 2, and empty the reader."""
        found, self._values = self._values, self._values.new_zeros(0, len(self.sets), 2)
        return found

    def forget_totals(self) -> None:
        """Begin to sum for `measure` anew, as `zero_grad` does for .grad."""
        self._totals.clear()

    @torch.no_grad()
    def measure(self, reduce: Callable[[Tensor], None] | None = None) -> Coverage:
        """Compare what was read since `forget_totals` with .grad, which has to hold the gradient of the same passes.

        Each weight's gradient is compared in the bases of the directions, L^T G R. `reduce` sums a tensor over
        processes in place, where .grad is averaged over them. Sets `share_read`.
        """
        squares, compared = dict[str, float](), dict[str, tuple[Tensor, Tensor]]()
        for name, p in self._model.named_parameters():
            if not p.requires_grad or p.grad is None:
                continue
            grad = widened(p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad)
            squares[name] = float(grad.square().sum())
            if name in self._bases and name not in self._skipped:
                true = self._in_bases(name, grad).double()
                found = self._totals[name].double() if name in self._totals else torch.zeros_like(true)
                if reduce is not None:
                    reduce(found)
                compared[name] = found, true
        factors = [float((a * b).sum() / a.square().sum()) for a, b in compared.values() if a.any()]
        factor = float(torch.tensor(factors).median()) if factors else 1.0
        unread, missed = self.unread, 0.0
        for name, square in squares.items():
            gap = 1.0
            if name in compared:
                found, true = compared[name]
                gap = float((true - factor * found).norm() / max(float(true.norm()), 1e-30)) ** 2
                if gap > 1e-3:
                    unread[name] = "its weight is used outside of its layer, too"
            missed += min(1.0, gap) * square
        total = sum(squares.values())
        self.share_read = 1.0 - missed / total if total else 0.0
        return Coverage(self.share_read, factor, unread)

    def _in_bases(self, name: str, grad: Tensor) -> Tensor:
        """Return L^T G R of each set, or a vector's gradient as it is."""
        if name in self._bases.vectors:
            return grad
        left, right = (side[name].to(grad.dtype) for side in (self._bases.left, self._bases.right))
        sets = self._bases.sets
        left_S, right_S = (side.view(len(side), sets, -1).transpose(0, 1) for side in (left, right))
        return left_S.transpose(1, 2) @ grad @ right_S
