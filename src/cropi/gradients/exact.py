"""Readers without projection: the dense sum of gradients, and inner products of gradients with dense directions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from cropi.gradients.capture import FactorReader
from cropi.gradients.packing import Segment, Span

AT_ONCE = 1 << 27  # numbers copied to float64 at once: 1 GiB


class DenseReader(FactorReader):
    """Sum the gradients of all segments, by parameter name, and the inputs of each linear layer.

    One matrix product per layer and pack: as much work as a third forward pass. Shapes are those of the parameters;
    float32, or wider if the parameters are. Other parameters are skipped. Inputs count a prompt once, however its group
    is divided; `vocabulary` names the head's weight, which sees predictions instead of tokens.
    """

    def __init__(self, parameters: Mapping[str, Tensor], vocabulary: Collection[str]) -> None:
        self._vocabulary = vocabulary
        self.gradients = {
            name: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for name, p in parameters.items()
        }
        self.inputs: dict[str, Tensor] = {}
        """Number of input tokens, followed by their sum, float64; by the name of a linear layer's weight."""

    def undo(self) -> bool:
        """Reset all sums in place, since one pack cannot be subtracted. Memory has run out when this is called."""
        for gradient in self.gradients.values():
            gradient.zero_()
        self.inputs.clear()
        return False

    def begin(self, segments: Sequence[Segment]) -> None:
        self._fresh = None  # mask of the tokens not read before; None: all
        if any(segment.repeats_prompt for segment in segments):
            parts = [
                [not segment.repeats_prompt] * len(segment.prompt_ids)
                + [True] * (segment.tokens - len(segment.prompt_ids))
                for segment in segments
            ]
            self._fresh = torch.tensor([fresh for part in parts for fresh in part])

    def linear(self, name: str, inputs_TI: Tensor, grads_TO: Tensor, spans: Sequence[Span]) -> None:
        if name not in self.gradients:
            return
        self.gradients[name] += outer_sum(grads_TO, inputs_TI)
        if self._fresh is not None and name not in self._vocabulary:
            inputs_TI = inputs_TI[self._fresh.to(inputs_TI.device)]
        total_I = inputs_TI.double().sum(dim=0)
        found_1I = torch.cat([total_I.new_full((1,), len(inputs_TI)), total_I])
        self.inputs[name] = self.inputs.get(name, 0.0) + found_1I

    def rows(self, name: str, ids_T: Tensor, grads_TI: Tensor, spans: Sequence[Span]) -> None:
        if name in self.gradients:
            self.gradients[name].index_add_(0, ids_T, grads_TI.to(self.gradients[name].dtype))

    def vector(self, name: str, grads_TP: Tensor, spans: Sequence[Span]) -> None:
        if name in self.gradients:
            self.gradients[name] += grads_TP.to(self.gradients[name].dtype).sum(dim=0)


class ExactReader(FactorReader):
    """Compute inner products of every row's gradient with dense directions, and its squared norm if asked for.

    Per linear layer (O, I), T tokens and V directions, sum_t g_t^T (D_v a_t) takes V 2 T O I operations. Forming the
    gradient of one row in one layer at a time takes 2 T O I + 2 V O I. The cheaper of the two is used. The same holds
    for the squared norm: token by token, <A A^T, B B^T> in 2 T^2 (O + I), or from the formed gradient. A norm needs
    each row's trajectories in one segment. For parameters reported in several parts (`Engine.repeated`), each row's
    gradient is kept until the pack is done.
    """

    def __init__(
        self,
        directions: Sequence[Mapping[str, Tensor]],
        count: int,
        *,
        norms: bool = False,
        repeated: Collection[str] | None = None,
    ) -> None:
        """`count` is the number of result rows; directions have the shapes of the parameters. Without `repeated`, all
        parameters count as repeated, and norms take the memory of one gradient per row of a pack."""
        first, *others = directions
        self._directions = {
            name: torch.stack([found, *(direction[name] for direction in others)]) if others else found[None]
            for name, found in first.items()
        }
        self._norms = norms
        self._repeated = (set(self._directions) if repeated is None else set(repeated)) if norms else set()
        self.row_bytes = sum(4 * self._directions[name][0].numel() for name in self._repeated)
        self._whole: dict[str, Tensor] = {}
        self.products_NV = torch.zeros(count, len(directions), dtype=torch.float64)
        self.squares_N = torch.zeros(count, dtype=torch.float64)

    def begin(self, segments: Sequence[Segment]) -> None:
        self._rows = sorted({segment.index for segment in segments})
        if self._norms and len(self._rows) < len(segments):
            raise ValueError("a norm needs all trajectories of a row in one segment")
        self._slots = {index: slot for slot, index in enumerate(self._rows)}
        device = next(iter(self._directions.values())).device
        self._products = torch.zeros(len(self._rows), self.products_NV.shape[1], dtype=torch.float64, device=device)
        self._squares = torch.zeros(len(self._rows), dtype=torch.float64, device=device)
        self._whole = {
            name: self._directions[name].new_zeros(len(self._rows), *self._directions[name].shape[1:])
            for name in self._repeated
        }

    def undo(self) -> bool:
        self._whole.clear()
        return True

    def commit(self) -> None:
        for name, whole in self._whole.items():
            for index, slot in self._slots.items():
                self._meet(name, index, whole[slot])
        rows = torch.tensor(self._rows)
        self.products_NV.index_add_(0, rows, self._products.cpu())
        self.squares_N.index_add_(0, rows, self._squares.cpu())
        self._whole.clear()

    def linear(self, name: str, inputs_TI: Tensor, grads_TO: Tensor, spans: Sequence[Span]) -> None:
        sets, outs, ins = self._directions[name].shape
        formed = 2 * len(inputs_TI) * outs * ins + (sets + self._norms) * 2 * outs * ins * len(spans)
        by_token = sets * 2 * len(inputs_TI) * outs * ins
        if self._norms:
            by_token += sum(2 * (span.stop - span.start) ** 2 * (outs + ins) for span in spans)
        if name in self._whole or formed < by_token:
            for span in spans:
                part = slice(span.start, span.stop)
                self._take(name, span.index, outer_sum(grads_TO[part], inputs_TI[part]))
        else:
            self._meet_by_token(name, widened(inputs_TI), widened(grads_TO), spans)

    def rows(self, name: str, ids_T: Tensor, grads_TI: Tensor, spans: Sequence[Span]) -> None:
        directions_VOI = self._directions[name]
        grads_TI = grads_TI.to(directions_VOI.dtype)
        if name in self._whole:
            for span in spans:
                part = slice(span.start, span.stop)
                self._whole[name][self._slots[span.index]].index_add_(0, ids_T[part], grads_TI[part])
            return
        for span in spans:
            part, slot = slice(span.start, span.stop), self._slots[span.index]
            ids_U, gradient_UI = row_sums(ids_T[part], grads_TI[part])
            self._products[slot] += (directions_VOI[:, ids_U] * gradient_UI).flatten(start_dim=1).sum(1).double()
            if self._norms:
                self._squares[slot] += (gradient_UI * gradient_UI).sum(dtype=torch.float64)

    def vector(self, name: str, grads_TP: Tensor, spans: Sequence[Span]) -> None:
        for span in spans:
            own_TP = grads_TP[span.start : span.stop].to(self._directions[name].dtype)
            self._take(name, span.index, own_TP.sum(dim=0))

    def _take(self, name: str, index: int, gradient: Tensor) -> None:
        """Keep a gradient of which further parts may come; compute with others at once."""
        if name in self._whole:
            self._whole[name][self._slots[index]] += gradient
        else:
            self._meet(name, index, gradient)

    def _meet(self, name: str, index: int, gradient: Tensor) -> None:
        slot, flat = self._slots[index], gradient.reshape(-1)
        self._products[slot] += (self._directions[name].flatten(start_dim=1) @ flat).double()
        if self._norms:
            self._squares[slot] += (flat @ flat).double()

    def _meet_by_token(self, name: str, inputs_TI: Tensor, grads_TO: Tensor, spans: Sequence[Span]) -> None:
        products = [((inputs_TI @ d_OI.T) * grads_TO).sum(dim=1) for d_OI in self._directions[name]]
        products_VT = torch.stack(products).double()
        for span in spans:
            part, slot = slice(span.start, span.stop), self._slots[span.index]
            self._products[slot] += products_VT[:, part].sum(dim=1)
            if self._norms:
                inputs, grads = inputs_TI[part], grads_TO[part]
                self._squares[slot] += ((inputs @ inputs.T) * (grads @ grads.T)).sum(dtype=torch.float64)


def row_sums(ids_T: Tensor, grads_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Return distinct ids and the sum of the gradients of each."""
    ids_U, inverse_T = ids_T.unique(return_inverse=True)
    return ids_U, grads_TI.new_zeros(len(ids_U), grads_TI.shape[1]).index_add_(0, inverse_T, grads_TI)


def widened(tensor: Tensor) -> Tensor:
    """Convert to float32, unless it is wider already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def outer_sum(grads_TO: Tensor, inputs_TI: Tensor) -> Tensor:
    """Compute sum_t grads[t] inputs[t]^T, (O, I), in float32 or wider.

    On CUDA, 16-bit factors stay 16-bit, so that tensor cores can be used.
    """
    if grads_TO.is_cuda and grads_TO.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(grads_TO.T, inputs_TI.to(grads_TO.dtype), out_dtype=torch.float32)
    inputs_TI = widened(inputs_TI)
    return grads_TO.to(inputs_TI.dtype).T @ inputs_TI


def add_outer_sum(total_WO: Tensor, left_TW: Tensor, right_TO: Tensor) -> None:
    """Add sum_t left[t] right[t]^T, computed as in `outer_sum`, to a (W, O) tensor of float32 or wider."""
    if right_TO.is_cuda and right_TO.dtype in (torch.bfloat16, torch.float16):
        total_WO += outer_sum(left_TW.to(right_TO.dtype), right_TO)
    else:
        total_WO.addmm_(left_TW.to(total_WO.dtype).T, right_TO.to(total_WO.dtype))


def inner(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Compute the inner product of two gradients by parameter name, in float64."""
    total = 0.0
    for name in first:
        parts = (gradients[name].reshape(-1).split(AT_ONCE) for gradients in (first, second))
        total += sum((one.double() * other.double()).sum() for one, other in zip(*parts, strict=True))
    return float(total)


def norm(gradients: Mapping[str, Tensor]) -> float:
    """Compute the norm of a gradient by parameter name, in float64."""
    return inner(gradients, gradients) ** 0.5
