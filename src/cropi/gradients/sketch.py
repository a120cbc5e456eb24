"""Gradient features: a sparse random projection read off the factors of a gradient.

Of each linear layer only what the projection keeps is ever computed. See `SparseProjection` for the map itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from cropi.functional.projection import SparseProjection, fold
from cropi.gradients.exact import row_sums
from cropi.gradients.packing import Segment, Span

_CHUNK = 1 << 24  # coordinates hashed at once: 8 bytes each


class GradientMap(Protocol):
    """A linear map from gradients to sums over 2 * dim signed buckets, given factors or dense tensors."""

    projection: SparseProjection

    def narrow(self, name: str, inputs_TI: Tensor) -> Tensor:
        """What of a linear layer's inputs (or an embedding's gradients) the map needs, float32 or wider."""

    def add_product(self, name: str, narrowed_TW: Tensor, grads_TO: Tensor, out_B: Tensor) -> None:
        """Add the image of grads^T inputs."""

    def add_rows(self, name: str, ids_U: Tensor, narrowed_UW: Tensor, out_B: Tensor) -> None:
        """Add the image of a gradient that is zero outside the given rows."""

    def add_vector(self, name: str, gradient_P: Tensor, out_B: Tensor) -> None:
        """Add the image of the gradient of a vector parameter."""


class UniformMap:
    """Every coordinate kept by chance. The gradient of each linear layer is formed, one row and layer at a time."""

    def __init__(self, projection: SparseProjection, parameters: Mapping[str, nn.Parameter]) -> None:
        self.projection = projection
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self._plans = {name: self._plan(name, p.numel(), p.device) for name, p in parameters.items()}
        self._scale = projection.keep_fraction**-0.5

    def _plan(self, name: str, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Kept positions in ascending order, and their signed buckets."""
        index = torch.int32 if count < 1 << 31 else torch.int64
        positions, buckets = [], []
        for start in range(0, count, _CHUNK):
            counters = torch.arange(start, min(start + _CHUNK, count), device=device)
            kept = counters[self.projection.mask_of(name, counters)]
            positions.append(kept.to(index))
            buckets.append(self.projection.signed_buckets(name, kept).to(torch.int32))
        return torch.cat(positions), torch.cat(buckets)

    def narrow(self, name: str, inputs_TI: Tensor) -> Tensor:
        return widened(inputs_TI)

    def add_product(self, name: str, narrowed_TW: Tensor, grads_TO: Tensor, out_B: Tensor) -> None:
        self.add_vector(name, (grads_TO.to(narrowed_TW.dtype).T @ narrowed_TW).reshape(-1), out_B)

    def add_rows(self, name: str, ids_U: Tensor, narrowed_UW: Tensor, out_B: Tensor) -> None:
        width = narrowed_UW.shape[1]
        step = max(1, _CHUNK // width)
        for start in range(0, len(ids_U), step):
            counters = ids_U[start : start + step, None] * width + torch.arange(width, device=ids_U.device)
            kept = self.projection.mask_of(name, counters.reshape(-1))
            buckets = self.projection.signed_buckets(name, counters.reshape(-1)[kept])
            _scatter(buckets, narrowed_UW[start : start + step].reshape(-1)[kept], out_B, self._scale)

    def add_vector(self, name: str, gradient_P: Tensor, out_B: Tensor) -> None:
        positions, buckets = self._plans[name]
        _scatter(buckets, gradient_P.index_select(0, positions), out_B, self._scale)


@dataclass(frozen=True)
class _Layer:
    """What the structured map keeps of one linear layer (O, I)."""

    directions_IR: Tensor
    directions_CR: Tensor
    """The directions at the kept columns alone."""
    columns_C: Tensor
    rows: Tensor | None
    """Kept rows of the rest; None: all."""
    scale: float
    """1 / sqrt(share of the rest that is kept)."""
    buckets_OW: Tensor
    """Signed buckets of [G U | kept columns of the rest]."""


class StructuredMap:
    """Of each linear layer a few directions of its inputs in full, and random rows and columns of the rest.

    Narrowed inputs are [a U | scale (a - U U^T a) at the kept columns]: one matrix product with the output gradients
    gives all that is kept of a layer. Parameters that no linear layer owns are kept whole.
    """

    def __init__(
        self,
        projection: SparseProjection,
        parameters: Mapping[str, nn.Parameter],
        directions: Mapping[str, Tensor],
        vocabulary: Collection[str],
    ) -> None:
        """`directions` holds U (I, r) by the name of each linear layer's weight; `vocabulary` the names of those whose
        rows are tokens, of which none is left out: a few tokens carry most of such a gradient."""
        self.projection = projection
        self._layers = {
            name: self._layer(name, parameters[name], u_IR, name in vocabulary) for name, u_IR in directions.items()
        }
        self._vectors = {
            name: self._hash(name, torch.arange(len(p), device=p.device))
            for name, p in parameters.items()
            if p.dim() == 1
        }

    def _layer(self, name: str, weight: Tensor, directions_IR: Tensor, all_rows: bool) -> _Layer:
        outs, ins = weight.shape
        rank, device = directions_IR.shape[1], weight.device
        projection = self.projection
        columns_C = projection.subset(name, "columns", ins, projection.keep_fraction / projection.row_fraction)
        kept, columns_C = None, columns_C.to(device)
        if projection.row_fraction < 1 and not all_rows:
            kept = projection.subset(name, "rows", outs, projection.row_fraction).to(device)
        share = len(columns_C) / ins * (1.0 if kept is None else len(kept) / outs)
        directions_IR = directions_IR.to(device, torch.promote_types(weight.dtype, torch.float32))
        rows_O1 = torch.arange(outs, device=device)[:, None]
        along_OR = self._hash(f"{name}/directions", rows_O1 * rank + torch.arange(rank, device=device))
        rest_OC = self._hash(name, rows_O1 * ins + columns_C)
        buckets_OW = torch.cat([along_OR, rest_OC], dim=1)
        return _Layer(directions_IR, directions_IR[columns_C], columns_C, kept, share**-0.5, buckets_OW)

    def _hash(self, name: str, counters: Tensor) -> Tensor:
        return self.projection.signed_buckets(name, counters.reshape(-1)).to(torch.int32).reshape(counters.shape)

    def narrow(self, name: str, inputs_TI: Tensor) -> Tensor:
        if name not in self._layers:
            return widened(inputs_TI)
        layer = self._layers[name]
        along_TR = inputs_TI.to(layer.directions_IR.dtype) @ layer.directions_IR
        rest_TC = inputs_TI.index_select(1, layer.columns_C).to(along_TR.dtype)
        rest_TC = torch.addmm(rest_TC, along_TR, layer.directions_CR.T, alpha=-layer.scale, beta=layer.scale)
        return torch.cat([along_TR, rest_TC], dim=1)

    def add_product(self, name: str, narrowed_TW: Tensor, grads_TO: Tensor, out_B: Tensor) -> None:
        layer, grads_TO = self._layers[name], grads_TO.to(narrowed_TW.dtype)
        if layer.rows is None:
            _scatter(layer.buckets_OW, grads_TO.T @ narrowed_TW, out_B)
            return
        rank = layer.directions_IR.shape[1]
        _scatter(layer.buckets_OW[:, :rank], grads_TO.T @ narrowed_TW[:, :rank], out_B)
        rest_RC = grads_TO.index_select(1, layer.rows).T @ narrowed_TW[:, rank:]
        _scatter(layer.buckets_OW[layer.rows, rank:], rest_RC, out_B)

    def add_rows(self, name: str, ids_U: Tensor, narrowed_UW: Tensor, out_B: Tensor) -> None:
        if name in self._layers:
            layer = self._layers[name]
            if layer.rows is not None:
                narrowed_UW = narrowed_UW.clone()
                narrowed_UW[~torch.isin(ids_U, layer.rows), layer.directions_IR.shape[1] :] = 0
            _scatter(layer.buckets_OW[ids_U], narrowed_UW, out_B)
            return
        width = narrowed_UW.shape[1]
        step = max(1, _CHUNK // width)
        for start in range(0, len(ids_U), step):
            ids = ids_U[start : start + step, None] * width + torch.arange(width, device=ids_U.device)
            _scatter(self._hash(name, ids), narrowed_UW[start : start + step], out_B)

    def add_vector(self, name: str, gradient_P: Tensor, out_B: Tensor) -> None:
        _scatter(self._vectors[name], gradient_P, out_B)


def widened(tensor: Tensor) -> Tensor:
    """In float32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _scatter(buckets: Tensor, values: Tensor, out_B: Tensor, scale: float = 1.0) -> None:
    out_B.index_add_(0, buckets.reshape(-1), values.reshape(-1).to(out_B.dtype), alpha=scale)


def project(gradient_map: GradientMap, gradients: Mapping[str, Tensor]) -> Tensor:
    """The feature (dim,) of a gradient given by parameter name, float32 or wider. The oracle of `SketchReader`."""
    first = next(iter(gradients.values()))
    out_B = torch.zeros(2 * gradient_map.projection.dim, dtype=widened(first[:0]).dtype, device=first.device)
    for name, gradient in gradients.items():
        if gradient.dim() == 1:
            gradient_map.add_vector(name, gradient, out_B)
        else:
            rows = torch.arange(len(gradient), device=gradient.device)
            gradient_map.add_rows(name, rows, gradient_map.narrow(name, gradient), out_B)
    return fold(out_B)


class SketchReader:
    """The feature of each row's gradient, (N, dim) float32 or wider, in main memory."""

    def __init__(self, gradient_map: GradientMap, count: int, dtype: torch.dtype = torch.float32) -> None:
        self._map = gradient_map
        self.features_ND = torch.zeros(count, gradient_map.projection.dim, dtype=dtype)

    def begin(self, segments: Sequence[Segment]) -> None:
        self._rows = sorted({segment.index for segment in segments})
        self._sums: dict[int, Tensor] = {}

    def undo(self) -> bool:
        self._sums.clear()
        return True

    def commit(self) -> None:
        sums_NB = torch.stack([self._sums[index] for index in self._rows])
        self.features_ND.index_add_(0, torch.tensor(self._rows), fold(sums_NB).to("cpu", self.features_ND.dtype))
        self._sums.clear()

    def _sum(self, index: int, device: torch.device) -> Tensor:
        if index not in self._sums:
            size = 2 * self._map.projection.dim
            self._sums[index] = torch.zeros(size, dtype=self.features_ND.dtype, device=device)
        return self._sums[index]

    def linear(self, name: str, inputs_TI: Tensor, grads_TO: Tensor, spans: Sequence[Span]) -> None:
        narrowed_TW = self._map.narrow(name, inputs_TI)
        for span in spans:
            part = slice(span.start, span.stop)
            out_B = self._sum(span.index, grads_TO.device)
            self._map.add_product(name, narrowed_TW[part], grads_TO[part], out_B)

    def rows(self, name: str, ids_T: Tensor, grads_TI: Tensor, spans: Sequence[Span]) -> None:
        narrowed_TW = self._map.narrow(name, grads_TI)
        for span in spans:
            part = slice(span.start, span.stop)
            ids_U, sums_UW = row_sums(ids_T[part], narrowed_TW[part])
            self._map.add_rows(name, ids_U, sums_UW, self._sum(span.index, grads_TI.device))

    def vector(self, name: str, grads_TP: Tensor, spans: Sequence[Span]) -> None:
        for span in spans:
            gradient_P = widened(grads_TP[span.start : span.stop]).sum(dim=0)
            self._map.add_vector(name, gradient_P, self._sum(span.index, grads_TP.device))
