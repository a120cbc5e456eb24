"""Validation directions: a low-rank mean gradient of one validation set, in two halves.

A single-pass two-sided sketch (Tropp, Yurtsever, Udell, Cevher 2017) keeps Y = G Omega and W = Psi G per weight and half,
with k and l = 2 k + 1 test vectors. Then Q = orth(Y), X = (Psi Q)^+ W and G is about Q X. Small weights are summed whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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


@dataclass(frozen=True)
class Direction:
    """D_h = left @ halves[h] @ right per weight (m x n), by parameter name; D is the mean of the two halves."""

    left: Mapping[str, Tensor]
    """m x p."""
    halves: Mapping[str, Tensor]
    """2 x p x q."""
    right: Mapping[str, Tensor]
    """q x n."""
    vectors: Mapping[str, Tensor]
    """Norm scales and biases, 2 x n."""
    completions: int = 0
    agreement: float = float("nan")
    """Mean leave-one-out inner product of the members over its standard error."""

    @classmethod
    def whole(cls, gradients: Mapping[str, Tensor]) -> Direction:
        """Make the direction of full rank that is `gradients` (2 x the parameter's shape)."""
        matrices = {name: g for name, g in gradients.items() if g.dim() == 3}
        return cls(
            {name: torch.eye(g.shape[1], dtype=g.dtype) for name, g in matrices.items()},
            matrices,
            {name: torch.eye(g.shape[2], dtype=g.dtype) for name, g in matrices.items()},
            {name: g for name, g in gradients.items() if g.dim() == 2},
        )


class _Probes:
    """Gaussian test matrices of one weight, drawn from its name and the seed."""

    def __init__(self, name: str, shape: Sequence[int], rank: int, width: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
        m, n = shape
        k = min(2 * rank + 1, m, n)
        ell = 2 * k + 1
        self.exact = k * m + ell * n >= m * n

        def draw(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator).to(device)

        def compress(size: int) -> Tensor:
            whole = torch.eye(size, device=device)
            return whole if size <= width else draw(size, width) / width**0.5

        self.left, self.right = compress(m), compress(n)
        if not self.exact:
            self.omega, self.psi = draw(n, k), draw(m, ell)


class DirectionSketch:
    """Accumulates the mean gradient of one validation set over rounds of backward passes, with forgetting."""

    def __init__(self, model: nn.Module, *, rank: int = 16, seed: int = 0, width: int = 32) -> None:
        """`rank` is the direction's rank; inner products of members use width x width compressions of each weight."""
        self.model = unwrapped(model)
        self.layers, self.unread = find_layers(self.model)
        self._rank = rank
        device = {name: p.device for name, p in self.model.named_parameters()}
        self._matrices, self._vectors = parameter_shapes(self.model, self.layers)
        self._probes = {
            name: _Probes(name, shape, rank, width, seed, device[name]) for name, shape in self._matrices.items()
        }
        self._sums: dict[str, Tensor] = {}
        """Accumulators, 2 x shape: NAME for whole weights and vectors, NAME.Y and NAME.W for sketches."""
        self._old: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}
        self._members, self._count, self.completions = 0, 0.0, 0

    def begin(self, members: int, keep: float = 0.0) -> None:
        """Start a round of `members` validation prompts; what earlier rounds summed counts `keep`."""
        for name, own in self._own.items():
            self._old[name] = self._old.get(name, 0.0) + own.sum(0)
        for sums in (self._sums, self._old):
            for name in sums:
                sums[name] = sums[name] * keep
        self._own = {}
        self._members, self._count, self.completions = members, self._count * keep + members, 0

    @contextmanager
    def directing(self, members: Sequence[int], halves: Sequence[int]) -> Iterator[Callable[[Tensor], None]]:
        """Enclose a forward pass of `self.model` and the backward pass, which the yielded function runs.

        `members` (below the round's count) and `halves` (0 or 1) number the sequences. Dropout is off and reentrant
        checkpointing replaced inside. No .grad, gradient reducer or random state is touched.
        """
        work = _Directing(self, torch.as_tensor(members), torch.as_tensor(halves))
        watch = Watch(self.model, self.layers, work)

        def backward(loss: Tensor) -> None:
            if not watch.lookups:
                raise RuntimeError("the forward pass called no embedding, so nothing can be differentiated")
            torch.autograd.grad(loss, watch.lookups, allow_unused=True)

        with _without_dropout(self.model), watch.hooks(lookups=True):
            yield backward
        self.completions += len(members)

    def add(self, name: str, half: int, value: Tensor) -> None:
        """Add to an accumulator of one half."""
        if name not in self._sums:
            self._sums[name] = value.new_zeros(2, *value.shape)
        self._sums[name][half] += value

    def add_own(self, name: str, places: Tensor, value: Tensor) -> None:
        """Add to the compressed gradients of members and halves; `places` = 2 member + half."""
        if name not in self._own:
            self._own[name] = value.new_zeros(self._members, 2, *value.shape[1:])
        self._own[name].flatten(0, 1).index_add_(0, places.to(value.device), value)

    def leave_one_out(self) -> Tensor:
        """Influence of each member on the halves of the others' direction, members x 2, float64.

        Sums with half-weights are doubled, so the mean of the two is the inner product with the direction.
        """
        found = torch.zeros(self._members, 2, dtype=torch.float64)
        for name, own in self._own.items():
            flat = own.double().flatten(2)
            total = flat.sum(0) + (self._old[name].double().flatten(1) if name in self._old else 0.0)
            found += torch.einsum("mi,mhi->mh", flat.sum(1), 2 * (total - flat)).cpu()
        return found / max(self._count - 1, 1)

    def agreement(self) -> float:
        """Mean leave-one-out influence in standard errors; nan below three members."""
        values = self.leave_one_out().mean(1)
        if len(values) < 3:
            return float("nan")
        return float(values.mean() / (values.std() / len(values) ** 0.5).clamp_min(1e-300))

    @torch.no_grad()
    def direction(self, rank: int | None = None) -> Direction:
        """Return the mean gradient, each weight truncated to `rank` (the sketch's own where None)."""
        rank, factor = rank or self._rank, 2.0 / max(self._count, 1.0)
        left, halves, right = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
        for name, probes in self._probes.items():
            if name not in self._sums and f"{name}.Y" not in self._sums:
                continue
            if probes.exact:
                basis, parts = None, self._sums[name] * factor
            else:
                basis = torch.linalg.qr(self._sums[f"{name}.Y"].sum(0)).Q
                solve = torch.linalg.pinv(probes.psi.to(basis.dtype).T @ basis)
                parts = solve @ self._sums[f"{name}.W"] * factor
            u, _, vh = torch.linalg.svd(parts.mean(0), full_matrices=False)
            u, vh = u[:, :rank], vh[:rank]
            halves[name], right[name] = u.T @ parts @ vh.T, vh
            left[name] = u if basis is None else basis @ u
        vectors = {name: self._sums[name] * factor for name in self._vectors if name in self._sums}
        return Direction(left, halves, right, vectors, self.completions, self.agreement())

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and counts: the sketch is linear, test matrices come from the seed."""
        return {
            "sums": self._sums,
            "old": self._old,
            "own": self._own,
            "counts": (self._members, self._count, self.completions),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._sums, self._old, self._own = (dict(state[key]) for key in ("sums", "old", "own"))
        self._members, self._count, self.completions = state["counts"]


class _Directing:
    """One pass: sums of both halves, and compressed gradients of members."""

    def __init__(self, sketch: DirectionSketch, members: Tensor, halves: Tensor) -> None:
        self.rows, self._sketch, self._halves = len(members), sketch, halves
        self._places = 2 * members + halves

    def skip(self, layer: Layer, why: str) -> None:
        for name in (layer.weight, layer.bias):
            if name is not None:
                self._sketch.unread[name] = f"{layer.path}: {why}"

    def keep(self, layer: Layer, values: Tensor) -> Tensor | None:
        return values if layer.weight is not None else None

    def meet(self, layer: Layer, kept: Tensor | None, grad: Tensor) -> None:
        if layer.bias is not None:
            self._vector(layer.bias, widened(grad).sum(1))
        if kept is None or layer.weight is None:
            return
        if layer.kind == NORM:
            self._vector(layer.weight, (normalised(layer.module, kept) * widened(grad)).sum(1))
        else:
            self._matrix(layer, layer.weight, kept, grad)

    def _vector(self, name: str, values: Tensor) -> None:
        for half in (0, 1):
            self._sketch.add(name, half, values[self._halves == half].sum(0))
        self._sketch.add_own(name, self._places, values)

    def _matrix(self, layer: Layer, name: str, kept: Tensor, grad: Tensor) -> None:
        probes, from_input = self._sketch._probes[name], layer.kind in (EMBEDDING, TRANSPOSED)

        def left(basis: Tensor) -> Tensor:
            return input_side(layer, kept, basis) if from_input else project(grad, basis)

        def right(basis: Tensor) -> Tensor:
            return project(grad, basis) if from_input else project(kept, basis)

        wide = widened(grad if from_input else kept)
        own = left(probes.left).to(wide.dtype).transpose(1, 2) @ right(probes.right).to(wide.dtype)
        self._sketch.add_own(name, self._places, own)
        for half in (0, 1):
            chosen = (self._halves == half).to(grad.device)
            if not bool(chosen.any()):
                continue
            if probes.exact:
                self._sketch.add(
                    name, half, _outer(left(torch.eye(len(probes.left), device=grad.device)), wide, chosen)
                )
            else:
                self._sketch.add(f"{name}.W", half, _outer(left(probes.psi), wide, chosen))
                self._sketch.add(f"{name}.Y", half, self._range(layer, kept, grad, right(probes.omega), chosen))

    def _range(self, layer: Layer, kept: Tensor, grad: Tensor, right: Tensor, chosen: Tensor) -> Tensor:
        """Sum u_t (v_t Omega) without one-hot vectors."""
        if layer.kind != EMBEDDING:
            return _outer(widened(kept if layer.kind == TRANSPOSED else grad), right, chosen)
        assert layer.weight is not None
        scales = input_side(layer, kept, torch.ones(layer.module.num_embeddings, 1, device=kept.device))  # type: ignore[arg-type]
        rows = (right * scales)[chosen].flatten(0, 1)
        found = rows.new_zeros(layer.module.num_embeddings, rows.shape[1])  # type: ignore[arg-type]
        return found.index_add_(0, kept[chosen].reshape(-1), rows)


def _outer(left: Tensor, right: Tensor, chosen: Tensor) -> Tensor:
    """Sum left_t right_t^T over the tokens of the chosen rows."""
    return left[chosen].flatten(0, 1).to(right.dtype).T @ right[chosen].flatten(0, 1)


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Put all modules in evaluation mode but those that checkpoint, and make these checkpoint without reentry."""
    modes = [(module, module.training) for module in model.modules()]
    replaced = []
    for module, training in modes:
        checkpoints = bool(getattr(module, "gradient_checkpointing", False))
        module.training = training and checkpoints
        if checkpoints and "_gradient_checkpointing_func" in module.__dict__:
            replaced.append((module, module._gradient_checkpointing_func))
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, function in replaced:
            module._gradient_checkpointing_func = function  # type: ignore[assignment]
