"""Gradient features: a sparse random projection computed from the factors of a gradient.

Of each linear layer, only the kept part is computed. See `SparseProjection` for the map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cropi.functional.projection import SparseProjection, fold
from cropi.gradients.capture import FactorReader
from cropi.gradients.exact import add_outer_sum, outer_sum, row_sums, widened
from cropi.gradients.packing import Segment, Span

_CHUNK = 1 << 24  # coordinates hashed at once: 8 bytes each


class UniformMap:
    """Keep each coordinate at random. Forms the gradient of each linear layer, one row and layer at a time."""

    def __init__(self, projection: SparseProjection, parameters: Mapping[str, Tensor]) -> None:
        self.projection = projection
        self.scale = projection.keep_fraction**-0.5
        buckets: list[Tensor] = []
        self._areas: dict[str, tuple[slice, Tensor]] = {}
        start = 0
        for name, parameter in parameters.items():
            positions, found = self._plan(name, parameter.numel(), parameter.device)
            self._areas[name] = (slice(start, start + len(positions)), positions)
            start += len(positions)
            buckets.append(found)
        self.buckets_K = torch.cat(buckets) if buckets else _no_buckets(parameters)

    def _plan(self, name: str, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return kept positions in ascending order, and their signed buckets."""
        index = torch.int32 if count < 1 << 31 else torch.int64
        positions, buckets = [], []
        for start in range(0, count, _CHUNK):
            counters = torch.arange(start, min(start + _CHUNK, count), device=device)
            kept = counters[self.projection.mask_of(name, counters)]
            positions.append(kept.to(index))
            buckets.append(self.projection.signed_buckets(name, kept).to(torch.int32))
        return torch.cat(positions), torch.cat(buckets)

    def narrow(self, name: str, inputs_TI: Tensor) -> Tensor:
        return inputs_TI

    def add_product(self, name: str, narrowed_TW: Tensor, grads_TO: Tensor, staged_K: Tensor) -> None:
        self.add_vector(name, outer_sum(grads_TO, narrowed_TW).reshape(-1), staged_K)

    def add_rows(self, name: str, ids_U: Tensor, narrowed_UW: Tensor, staged_K: Tensor, sums_B: Tensor) -> None:
        for counters, values in _by_coordinate(ids_U, narrowed_UW):
            kept = self.projection.mask_of(name, counters)
            buckets = self.projection.signed_buckets(name, counters[kept])
            sums_B.index_add_(0, buckets, values[kept].to(sums_B.dtype))

    def add_vector(self, name: str, gradient_P: Tensor, staged_K: Tensor) -> None:
        area, positions = self._areas[name]
        staged_K[area] += gradient_P.index_select(0, positions)


@dataclass(frozen=True)
class _Layer:
    """The kept part of one linear layer (O, I)."""

    directions_IR: Tensor
    directions_CR: Tensor  # the directions at the kept columns
    columns_C: Tensor
    scale: float  # 1 / sqrt(share of the rest that is kept)
    outs: int
    start: int
    """Offset in the staged numbers of [G U | kept columns of the rest]^T, (r + C, O): few long rows make a faster
    product."""


class StructuredMap:
    """Keep a few input directions of each linear layer in full, and random columns of the rest.

    Narrowed inputs are [a U | scale (a - U U^T a) at the kept columns]: one matrix product with the output gradients
    gives the kept part of a layer. Parameters outside linear layers are kept whole.
    """

    scale = 1.0

    def __init__(
        self, projection: SparseProjection, parameters: Mapping[str, Tensor], directions: Mapping[str, Tensor]
    ) -> None:
        """`directions` holds U (I, r) by the name of each linear layer's weight."""
        self.projection = projection
        self._layers: dict[str, _Layer] = {}
        self._vectors: dict[str, slice] = {}
        buckets: list[Tensor] = []
        start = 0
        for name, parameter in parameters.items():
            if name in directions:
                self._layers[name], found = self._layer(name, parameter, directions[name], start)
            elif parameter.dim() == 1:
                self._vectors[name] = slice(start, start + len(parameter))
                found = self._hash(name, torch.arange(len(parameter), device=parameter.device))
            else:
                continue
            start += len(found)
            buckets.append(found)
        self.buckets_K = torch.cat(buckets) if buckets else _no_buckets(parameters)

    def _layer(self, name: str, weight: Tensor, directions_IR: Tensor, start: int) -> tuple[_Layer, Tensor]:
        outs, ins = weight.shape
        rank, device, projection = directions_IR.shape[1], weight.device, self.projection
        columns_C = projection.subset(name, "columns", ins, projection.keep_fraction).to(device)
        share = len(columns_C) / ins
        # On CUDA 16-bit inputs are projected as they are; elsewhere in float32 or wider.
        dtype = weight.dtype if weight.is_cuda else torch.promote_types(weight.dtype, torch.float32)
        directions_IR = directions_IR.to(device, dtype)
        every = torch.arange(outs * rank, device=device).reshape(outs, rank)
        along_RO = self._hash(f"{name}/directions", every).T
        rest_CO = self._hash(name, torch.arange(outs, device=device)[:, None] * ins + columns_C).T
        found = torch.cat([along_RO.reshape(-1), rest_CO.reshape(-1)])
        return _Layer(directions_IR, directions_IR[columns_C], columns_C, share**-0.5, outs, start), found

    def _hash(self, name: str, counters: Tensor) -> Tensor:
        return self.projection.signed_buckets(name, counters.reshape(-1)).to(torch.int32).reshape(counters.shape)

    def narrow(self, name: str, inputs_TI: Tensor) -> Tensor:
        if name not in self._layers:
            return inputs_TI
        layer = self._layers[name]
        along_TR = inputs_TI.to(layer.directions_IR.dtype) @ layer.directions_IR
        rest_TC = inputs_TI.index_select(1, layer.columns_C).to(along_TR.dtype)
        rest_TC = torch.addmm(rest_TC, along_TR, layer.directions_CR.T, alpha=-layer.scale, beta=layer.scale)
        return torch.cat([along_TR, rest_TC], dim=1)

    @staticmethod
    def _kept(layer: _Layer, width: int, staged_K: Tensor) -> Tensor:
        """Return a view of a layer's staged numbers, (r + C, O); `width` is r + C."""
        return staged_K[layer.start : layer.start + layer.outs * width].view(width, layer.outs)

    def add_product(self, name: str, narrowed_TW: Tensor, grads_TO: Tensor, staged_K: Tensor) -> None:
        add_outer_sum(self._kept(self._layers[name], narrowed_TW.shape[1], staged_K), narrowed_TW, grads_TO)

    def add_rows(self, name: str, ids_U: Tensor, narrowed_UW: Tensor, staged_K: Tensor, sums_B: Tensor) -> None:
        if name in self._layers:
            self._kept(self._layers[name], narrowed_UW.shape[1], staged_K).index_add_(1, ids_U, narrowed_UW.T)
            return
        for counters, values in _by_coordinate(ids_U, narrowed_UW):
            sums_B.index_add_(0, self._hash(name, counters), values.to(sums_B.dtype))

    def add_vector(self, name: str, gradient_P: Tensor, staged_K: Tensor) -> None:
        staged_K[self._vectors[name]] += gradient_P


GradientMap = UniformMap | StructuredMap
"""A linear map from gradients to features, applied to factors or dense tensors.

The kept part of a row's gradient is gathered in K staged numbers, each with a signed bucket, and scattered once when
the row is complete. Embedding rows, of which a prompt uses few, are added to the 2 * dim sums directly.
"""


def _by_coordinate(ids_U: Tensor, rows_UW: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat positions in a matrix of some of its rows, and their values, a few rows at a time."""
    width = rows_UW.shape[1]
    step = max(1, _CHUNK // width)
    for start in range(0, len(ids_U), step):
        counters = ids_U[start : start + step, None] * width + torch.arange(width, device=ids_U.device)
        yield counters.reshape(-1), rows_UW[start : start + step].reshape(-1)


def _no_buckets(parameters: Mapping[str, Tensor]) -> Tensor:
    """Return no buckets: if only embeddings are trained, nothing is staged."""
    return torch.zeros(0, dtype=torch.int32, device=next(iter(parameters.values())).device)


class SketchReader(FactorReader):
    """Compute the feature of each row's gradient, (N, dim) float32 or wider, in main memory."""

    def __init__(self, gradient_map: GradientMap, count: int, dtype: torch.dtype = torch.float32) -> None:
        self._map = gradient_map
        self.row_bytes = 4 * (len(gradient_map.buckets_K) + 2 * gradient_map.projection.dim)
        self._staged_NK = gradient_map.buckets_K.new_zeros(0, len(gradient_map.buckets_K), dtype=dtype)
        self.features_ND = torch.zeros(count, gradient_map.projection.dim, dtype=dtype)

    def begin(self, segments: Sequence[Segment]) -> None:
        self._rows = sorted({segment.index for segment in segments})
        self._slots = {index: slot for slot, index in enumerate(self._rows)}
        if len(self._staged_NK) < len(self._rows):
            self._staged_NK = self._staged_NK.new_zeros(len(self._rows), self._staged_NK.shape[1])
        else:
            self._staged_NK[: len(self._rows)].zero_()
        self._sums_NB = self._staged_NK.new_zeros(len(self._rows), 2 * self._map.projection.dim)

    def undo(self) -> bool:
        self._sums_NB = self._staged_NK[:0]  # memory may have run out before there were any
        self._staged_NK = self._staged_NK[:0].clone()
        return True

    def commit(self) -> None:
        for slot in range(len(self._rows)):
            self._sums_NB[slot].index_add_(0, self._map.buckets_K, self._staged_NK[slot])
        features = fold(self._sums_NB).mul_(self._map.scale)
        self.features_ND.index_add_(0, torch.tensor(self._rows), features.to(self.features_ND))

    def linear(self, name: str, inputs_TI: Tensor, grads_TO: Tensor, spans: Sequence[Span]) -> None:
        narrowed_TW = self._map.narrow(name, inputs_TI)
        for span in spans:
            part, slot = slice(span.start, span.stop), self._slots[span.index]
            self._map.add_product(name, narrowed_TW[part], grads_TO[part], self._staged_NK[slot])

    def rows(self, name: str, ids_T: Tensor, grads_TI: Tensor, spans: Sequence[Span]) -> None:
        narrowed_TW = self._map.narrow(name, grads_TI)
        for span in spans:
            part, slot = slice(span.start, span.stop), self._slots[span.index]
            ids_U, sums_UW = row_sums(ids_T[part], widened(narrowed_TW[part]))
            self._map.add_rows(name, ids_U, sums_UW, self._staged_NK[slot], self._sums_NB[slot])

    def vector(self, name: str, grads_TP: Tensor, spans: Sequence[Span]) -> None:
        for span in spans:
            gradient_P = widened(grads_TP[span.start : span.stop]).sum(dim=0)
            self._map.add_vector(name, gradient_P, self._staged_NK[self._slots[span.index]])


def project(gradient_map: GradientMap, gradients: Mapping[str, Tensor]) -> Tensor:
    """Compute the feature (dim,) of a gradient by parameter name, float32 or wider."""
    first = next(iter(gradients.values()))
    staged_K = widened(first[:0]).new_zeros(len(gradient_map.buckets_K))
    sums_B = staged_K.new_zeros(2 * gradient_map.projection.dim)
    for name, gradient in gradients.items():
        gradient = gradient.to(staged_K.dtype)
        if gradient.dim() == 1:
            gradient_map.add_vector(name, gradient, staged_K)
        else:
            ids = torch.arange(len(gradient), device=gradient.device)
            gradient_map.add_rows(name, ids, widened(gradient_map.narrow(name, gradient)), staged_K, sums_B)
    sums_B.index_add_(0, gradient_map.buckets_K, staged_K)
    return fold(sums_B) * gradient_map.scale
