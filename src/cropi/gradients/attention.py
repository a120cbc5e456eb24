"""Attention over a pack: linear layers compute each token once, attention uses whole trajectories.

Packed tokens are gathered into rows (prompt + one completion) that start at position 0, so a mask that depends on
positions alone (causal, sliding window) is the same for all rows. Causal attention needs no mask tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cropi.errors import UncoveredError
from cropi.gradients.packing import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "cropi_packed"


@dataclass
class _State:
    """Rows of the current pack, and the masks that the model requested, to be checked afterwards."""

    rows: Rows
    calls: int = 0
    masks: list[tuple[Tensor, int | None]] = field(default_factory=list)
    """Masks requested by transformers, each with its window; layers may use some of them only, or views of them."""
    differs: bool = False  # whether a layer got another mask than the packed attention applies

    def note(self, mask: Tensor | None, window: int | None) -> None:
        """Count a layer's call, and compare its mask with its window."""
        self.calls += 1
        width = self.rows.blocks[0][1]
        allowed = None if mask is None else next((known for made, known in self.masks if _same_view(made, mask)), -1)
        reach, allowed_reach = (width if w is None else min(w, width) for w in (window, allowed))
        self.differs |= reach != allowed_reach


_current: ContextVar[_State] = ContextVar("rows of the pack in progress")


def _same_view(first: Tensor, second: Tensor) -> bool:
    same_memory = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    return same_memory and first.shape == second.shape


@contextmanager
def packed(model: PreTrainedModel) -> Iterator[None]:
    """Make a transformers model use packed attention inside the block."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _placeholder)
    with _implementation(model, IMPLEMENTATION):
        yield


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Make a transformers model use eager attention inside the block, for comparison."""
    with _implementation(model, "eager"):
        yield


@contextmanager
def _implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise unsupported(model, "its attention implementation cannot be set")
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def pack_rows(model: PreTrainedModel, rows: Rows) -> Iterator[None]:
    """Set the rows of the pack that goes through the model inside the block."""
    state = _State(rows)
    token = _current.set(state)
    try:
        yield
    finally:
        _current.reset(token)
    layers = model.config.get_text_config().num_hidden_layers
    if state.calls != layers:
        raise unsupported(model, f"{state.calls} of its {layers} layers use transformers' attention interface")
    if state.differs:
        raise unsupported(model, "its attention mask is neither causal nor a sliding window")


def unsupported(model: PreTrainedModel, why: str) -> UncoveredError:
    """Make the error for an architecture that the engine cannot reproduce."""
    return UncoveredError(
        f"gradients of {type(model).__name__} cannot be computed by the engine: {why}",
        where="policy",
        fix="use score.estimator=reference, which needs only autograd, and report the architecture.",
    )


def _placeholder(*_: Any, q_length: int, local_size: int | None = None, device: Any = None, **__: Any) -> Tensor:
    """Return a memory-free mask that identifies the window of a layer; the rows of the pack decide visibility."""
    mask = torch.ones((), dtype=torch.bool, device=device).expand(1, 1, q_length, q_length)
    _current.get().masks.append((mask, local_size))
    return mask


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Implement transformers' attention interface: (1, heads, S, head size) to (1, S, heads, head size)."""
    if options.get("s_aux") is not None:
        raise unsupported(module, "its attention has sinks")
    if not getattr(module, "is_causal", True):
        raise unsupported(module, "its attention is not causal")
    state = _current.get()
    sliding_window, softcap = options.get("sliding_window"), options.get("softcap")
    state.note(attention_mask, sliding_window)
    rows = state.rows
    heads, size = query.shape[1], value.shape[3]
    query, key, value = (packed_1HSE[0].transpose(0, 1) for packed_1HSE in (query, key, value))
    # Query gradients of shared prompt tokens come from one row; those of keys and values from every row.
    query_R = _ToRows.apply(query, rows, False)
    key_R, value_R = (_ToRows.apply(x, rows, True) for x in (key, value))
    results, start = [], 0
    for count, width in rows.blocks:
        part = slice(start, start + count * width)
        q, k, v = (x[part].view(count, width, -1, x.shape[-1]).transpose(1, 2) for x in (query_R, key_R, value_R))
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) if x.shape[1] != heads else x for x in (k, v))
        out_BHTE = _attend(q, k, v, scaling, sliding_window, softcap)
        results.append(out_BHTE.transpose(1, 2).reshape(count * width, heads * size))
        start = part.stop
    return _FromRows.apply(torch.cat(results), rows).view(1, -1, heads, size), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Compute causal attention over rows (B, heads, T, head size) that start at position 0."""
    width = query.shape[2]
    window = width if window is None else min(window, width)
    if softcap is None:
        mask = _visible(width, window, query.device) if window < width else None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    logits = torch.tanh(query @ key.transpose(2, 3) * scale / softcap) * softcap
    logits = logits.masked_fill(~_visible(width, window, query.device), torch.finfo(logits.dtype).min)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.softmax(logits, dim=-1, dtype=dtype).to(value.dtype) @ value


def _visible(width: int, window: int, device: torch.device) -> Tensor:
    """Make the mask of keys (columns) that each query (row) sees: itself and the `window` - 1 before it."""
    distance = torch.arange(width, device=device)[:, None] - torch.arange(width, device=device)[None]
    return (distance >= 0) & (distance < window)


class _ToRows(torch.autograd.Function):
    """Gather packed tokens (S, heads, head size) into rows. Backward adds up the copies of a shared prompt token."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, rows: Rows, shared: bool) -> Tensor:
        ctx.rows, ctx.shared = rows, shared
        return packed.index_select(0, rows.gather_R)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows = ctx.rows
        packed = grad.index_select(0, rows.scatter_S)
        if ctx.shared and rows.copies:
            total = packed.index_select(0, rows.prompt_tokens_Q)
            for places in rows.copies:
                total[: len(places)] += grad.index_select(0, places)
            packed.index_copy_(0, rows.prompt_tokens_Q, total)
        return packed, None, None


class _FromRows(torch.autograd.Function):
    """Scatter rows back to packed tokens, without padding and without further copies of a prompt."""

    @staticmethod
    def forward(ctx: Any, results_RE: Tensor, rows: Rows) -> Tensor:
        ctx.rows, ctx.count = rows, len(results_RE)
        return results_RE.index_select(0, rows.scatter_S)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        full = grad.new_zeros(ctx.count, grad.shape[1])
        return full.index_copy_(0, ctx.rows.scatter_S, grad), None
