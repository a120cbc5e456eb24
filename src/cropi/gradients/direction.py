"""The direction of a validation set: a mean gradient of low rank, sketched in one backward pass.

For a weight with gradient M (n_out x n_in), two products with fixed Gaussian matrices are summed over tokens,

    Y = M Omega,  W = Psi M,        Omega: n_in x k,  Psi: l x n_out,

from which M is about Q X with Q = orth(Y) and X = (Psi Q)^+ W, cut to rank r by the singular values of X (Tropp,
Yurtsever, Udell and Cevher 2017, algorithm 4; k = 2 r + 1, l = 2 k + 1). Sketches are linear: those of several passes,
processes and times add up, and forgetting is a factor. Vectors are kept whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from cropi.errors import PolicyError
from cropi.gradients.layer_taps import Layer, normalised, readable_layers, tapped, whole_shape
from cropi.gradients.training_influence import Direction, LowRank
from cropi.policy import evaluating


@dataclass
class _Sums:
    """Sums of one matrix, by part: Y (parts x n_out x k) and W (parts x l x n_in)."""

    right: Float[Tensor, "n_in k"]  # Omega
    left: Float[Tensor, "l n_out"]  # Psi
    after: Float[Tensor, "parts n_out k"]
    before: Float[Tensor, "parts l n_in"]


class DirectionSketch:
    """Sums the gradient of a model's readable parameters, over rows that belong to `parts` disjoint parts.

    Two parts, of different validation prompts, give two estimates of the direction with independent errors.
    """

    def __init__(self, model: nn.Module, rank: int = 8, parts: int = 2) -> None:
        """PolicyError for a compiled model."""
        self._layers, self._rank, self._parts = readable_layers(model), rank, parts
        parameters = dict(model.named_parameters())
        self._matrices: dict[str, _Sums] = {}
        self._vectors: dict[str, Tensor] = {}
        for name in sorted({name for layer in self._layers for name in layer.parameters}):
            self._prepare(name, parameters[name])
        self._part_of: Tensor | None = None

    def _prepare(self, name: str, parameter: Tensor) -> None:
        device, shape = parameter.device, whole_shape(parameter)
        if len(shape) == 1:
            self._vectors[name] = torch.zeros(self._parts, *shape, device=device)
            return
        n_out, n_in = shape
        k = min(2 * self._rank + 1, n_in, n_out)
        rows = min(2 * k + 1, n_out)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))  # the same in every process
        right = torch.randn(n_in, k, generator=generator) / k**0.5
        left = torch.randn(rows, n_out, generator=generator) / rows**0.5
        empty = torch.zeros(self._parts, n_out, k), torch.zeros(self._parts, rows, n_in)
        self._matrices[name] = _Sums(*(each.to(device) for each in (right, left, *empty)))

    @contextmanager
    def sketching(self, part_of: Int[Tensor, " B"]) -> Iterator[None]:
        """Add the gradients of one micro-batch, whose sequences belong to these parts."""
        self._part_of = (part_of[:, None] == torch.arange(self._parts)).float()
        try:
            with tapped(self._layers, self):
                yield
        finally:
            self._part_of = None

    @property
    def products(self) -> int:
        """Multiply-adds a token: (k + l) (n_in + n_out) for every matrix that is multiplied by."""
        linear = {layer.weight for layer in self._layers if layer.kind == "linear"}
        summed = [part for name, part in self._matrices.items() if name in linear]
        return sum((s.right.shape[1] + len(s.left)) * (s.right.shape[0] + s.left.shape[1]) for s in summed)

    def scale(self, factor: float) -> None:
        """Multiply all that was summed so far, to forget some of it."""
        for sums in self.sums().values():
            sums.mul_(factor)

    def sums(self) -> dict[str, Tensor]:
        """The sums by name, to add up over processes and to keep in a checkpoint. They are not copies."""
        found = {f"vector/{name}": part for name, part in self._vectors.items()}
        for name, part in self._matrices.items():
            found |= {f"after/{name}": part.after, f"before/{name}": part.before}
        return found

    def directions(self) -> list[Direction]:
        """The direction of each part: the sum of its gradients, with matrices cut to the rank."""
        found: list[Direction] = []
        for part in range(self._parts):
            own: dict[str, LowRank | Tensor] = {name: sums[part].clone() for name, sums in self._vectors.items()}
            own |= {name: _recovered(sums, part, self._rank) for name, sums in self._matrices.items()}
            found.append(own)
        return found

    # What a tap does

    def keep(self, layer: Layer, read: Tensor) -> tuple[Tensor, ...]:
        if layer.kind != "linear":
            return (read,)
        if layer.weight is None:
            return ()
        return read, read.float() @ self._matrices[layer.weight].right

    def meet(self, layer: Layer, gradient: Tensor, *kept: Tensor) -> None:
        assert self._part_of is not None, "a backward pass belongs inside the block of its forward pass"
        if gradient.dim() < 3 or len(gradient) != len(self._part_of):
            return  # as the reader has it
        tokens_BTO, parts = gradient.float().flatten(1, -2), self._part_of.to(gradient.device)
        if layer.kind == "norm" and layer.weight is not None:
            unit = normalised(layer, kept[0]).reshape(tokens_BTO.shape)
            self._vectors[layer.weight] += torch.einsum("bp,bto,bto->po", parts, tokens_BTO, unit)
        elif layer.weight is not None:
            self._meet_matrix(layer, self._matrices[layer.weight], tokens_BTO, parts, kept)
        if layer.bias is not None:
            self._vectors[layer.bias] += torch.einsum("bp,bto->po", parts, tokens_BTO)

    def _meet_matrix(
        self, layer: Layer, sums: _Sums, tokens_BTO: Tensor, parts: Tensor, kept: Sequence[Tensor]
    ) -> None:
        if layer.kind == "linear":
            read, projected = (each.float().flatten(1, -2) for each in kept)
            sums.after += torch.einsum("bp,bto,btk->pok", parts, tokens_BTO, projected)
            sums.before += torch.einsum("bp,btl,bti->pli", parts, tokens_BTO @ sums.left.T, read)
            return
        ids = kept[0].flatten(1)  # M has g_t in row id
        scaled = tokens_BTO * float(getattr(layer.module, "embed_scale", 1.0))
        if (padding := getattr(layer.module, "padding_idx", None)) is not None:
            scaled = scaled * (ids != padding)[..., None]
        for part, after in enumerate(sums.after):
            mine = scaled * parts[:, part, None, None]
            after.index_add_(0, ids.flatten(), (mine @ sums.right).flatten(0, 1))
        sums.before += torch.einsum("bp,btl,bti->pli", parts, sums.left.T[ids], scaled)


def _recovered(sums: _Sums, part: int, rank: int) -> LowRank:
    """Cut one part of a matrix to the rank, on the CPU: CUDA has no least squares of deficient rank."""
    device = sums.after.device
    left, after, before = (each.cpu().double() for each in (sums.left, sums.after[part], sums.before[part]))
    basis, _ = torch.linalg.qr(after)
    core = torch.linalg.lstsq(left @ basis, before, driver="gelsd").solution
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    return LowRank((basis @ u[:, :rank] * s[:rank]).float().to(device), v[:rank].float().to(device))


def inner(first: Direction, second: Direction) -> float:
    """<first, second>, without forming a matrix."""
    total = 0.0
    for name in first.keys() & second.keys():
        a, b = first[name], second[name]
        if isinstance(a, LowRank) and isinstance(b, LowRank):
            total += float(((a.left.T @ b.left) * (a.right @ b.right.T)).sum())
        else:
            assert isinstance(a, Tensor)
            assert isinstance(b, Tensor)
            total += float(a @ b)
    return total


@contextmanager
def deterministic(model: nn.Module) -> Iterator[None]:
    """Without dropout, while gradient checkpointing stays on."""
    checkpointing = [m for m in model.modules() if m.training and isinstance(m, GradientCheckpointingLayer)]
    with evaluating(model):
        for layer in checkpointing:
            layer.training = True
        yield


@contextmanager
def backward_to_embeddings(model: PreTrainedModel) -> Iterator[Any]:
    """Yields `backward(loss)`, which runs a backward pass but fills no `.grad` and starts no hook of a parameter.

    The pass ends at the outputs of the embeddings. PolicyError where gradient checkpointing is reentrant, which
    allows no such pass.
    """
    if any(_is_reentrant(module) for module in model.modules()):
        raise PolicyError(
            "reentrant gradient checkpointing allows no backward pass without weight gradients",
            where="trainer.gradient_checkpointing_kwargs",
            fix="set use_reentrant: false.",
        )
    outputs: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        outputs.append(output if output.requires_grad else output.requires_grad_())
        return output

    def backward(loss: Tensor) -> None:
        torch.autograd.grad(loss, outputs, allow_unused=True)
        outputs.clear()

    embeddings = {model.get_input_embeddings()} | {m for m in model.modules() if isinstance(m, nn.Embedding)}
    with ExitStack() as stack:
        for module in embeddings:  # of positions as well: a pass to the tokens' alone leaves these out
            stack.callback(module.register_forward_hook(note, prepend=True).remove)
        yield backward


def _is_reentrant(module: nn.Module) -> bool:
    chosen = getattr(module, "_gradient_checkpointing_func", None)
    keywords: Mapping[str, Any] = getattr(chosen, "keywords", {})
    return bool(getattr(module, "gradient_checkpointing", False) and keywords.get("use_reentrant"))
