"""Attention over a pack: the linear layers see each token once, attention sees whole trajectories.

Packed tokens are gathered into rows (prompt + one completion) that all start at position 0, so any mask that depends on
positions alone (causal, sliding window) is the same for all rows. In the causal case no mask is needed at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cropi.errors import PolicyError
from cropi.gradients.packing import Rows

IMPLEMENTATION = "cropi_packed"


@dataclass
class _State:
    """The rows of the pack in progress, and what the model asked for, to be checked afterwards."""

    rows: Rows
    calls: int = 0
    windows: set[int] = field(default_factory=set)
    windows_of_masks: set[int] = field(default_factory=set)


_current: ContextVar[_State] = ContextVar("rows of the pack in progress")


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Make a transformers model use packed attention inside the block."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
    with _implementation(model, IMPLEMENTATION):
        yield


@contextmanager
def own_attention(model: nn.Module) -> Iterator[None]:
    """Make it use transformers' plainest attention inside the block, to be compared with."""
    with _implementation(model, "eager"):
        yield


@contextmanager
def _implementation(model: nn.Module, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)  # type: ignore[operator]
        if model.config._attn_implementation != name:
            raise unsupported(model, "it does not let its attention be chosen")
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


@contextmanager
def pack_rows(model: nn.Module, rows: Rows) -> Iterator[None]:
    """Name the rows of the pack that goes through the model inside the block."""
    state = _State(rows)
    token = _current.set(state)
    try:
        yield
    finally:
        _current.reset(token)
    layers = model.config.get_text_config().num_hidden_layers
    if state.calls != layers:
        raise unsupported(model, f"{state.calls} of its {layers} layers use transformers' attention interface")
    width = rows.gather_BT.shape[1]
    if {w for w in state.windows if w < width} != {w for w in state.windows_of_masks if w < width}:
        raise unsupported(model, "its attention mask is neither causal nor a sliding window")


def unsupported(model: nn.Module, why: str) -> PolicyError:
    """The error for an architecture that the engine cannot compute faithfully."""
    return PolicyError(
        f"gradients of {type(model).__name__} cannot be computed by the engine: {why}",
        where="policy",
        fix="use score.estimator=reference, which needs nothing but autograd, and report the architecture.",
    )


def _no_mask(*_: Any, local_size: int | None = None, **__: Any) -> None:
    """The mask of a pack follows from its rows; only the window it asks for is noted."""
    if local_size is not None:
        _current.get().windows_of_masks.add(local_size)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: tensors are (1, heads, S, head size), the result is (1, S, heads, head size)."""
    if kwargs.get("s_aux") is not None:
        raise unsupported(module, "its attention has sinks")
    if not getattr(module, "is_causal", True):
        raise unsupported(module, "its attention is not causal")
    state = _current.get()
    state.calls += 1
    rows, width = state.rows, state.rows.gather_BT.shape[1]
    if sliding_window is not None:
        state.windows.add(sliding_window)
    # Query gradients of shared prompt tokens come from one row alone; those of keys and values from every row.
    query_BHTE = _to_rows(query, rows, shared=False)
    key_BHTE, value_BHTE = _to_rows(key, rows, shared=True), _to_rows(value, rows, shared=True)
    mask = None
    if sliding_window is not None and sliding_window < width:
        mask = _window(width, sliding_window, query.device)
    if softcap is None:
        out_BHTE = F.scaled_dot_product_attention(
            query_BHTE,
            *_same_heads(query_BHTE, key_BHTE, value_BHTE),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
        )
    else:
        causal = _window(width, width, query.device) if mask is None else mask
        keys, values = _same_heads(query_BHTE, key_BHTE, value_BHTE)
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        logits = torch.tanh(query_BHTE @ keys.transpose(2, 3) * scale / softcap) * softcap
        logits = logits.masked_fill(~causal, torch.finfo(logits.dtype).min)
        out_BHTE = torch.softmax(logits, dim=-1, dtype=torch.float32).to(values.dtype) @ values
    heads, size = out_BHTE.shape[1], out_BHTE.shape[3]
    flat = out_BHTE.transpose(1, 2).reshape(-1, heads * size)
    return _FromRows.apply(flat, rows).view(1, -1, heads, size), None


def _window(width: int, window: int, device: torch.device) -> Tensor:
    """Which keys (columns) each query (rows) sees: itself and the `window` - 1 before it."""
    distance = torch.arange(width, device=device)[:, None] - torch.arange(width, device=device)[None]
    return (distance >= 0) & (distance < window)


def _same_heads(query_BHTE: Tensor, *others: Tensor) -> list[Tensor]:
    """Keys and values repeated for the query heads that share them."""
    return [x.repeat_interleave(query_BHTE.shape[1] // x.shape[1], dim=1) for x in others]


def _to_rows(packed_1HSE: Tensor, rows: Rows, *, shared: bool) -> Tensor:
    _, heads, tokens, size = packed_1HSE.shape
    flat = packed_1HSE.transpose(1, 2).reshape(tokens, heads * size)
    gathered = _ToRows.apply(flat, rows, shared)
    return gathered.view(*rows.gather_BT.shape, heads, size).transpose(1, 2)


class _ToRows(torch.autograd.Function):
    """Packed tokens to rows. Backward adds the copies of a shared prompt token, in the order of the rows."""

    @staticmethod
    def forward(ctx: Any, packed_SE: Tensor, rows: Rows, shared: bool) -> Tensor:
        ctx.rows, ctx.shared = rows, shared
        return packed_SE.index_select(0, rows.gather_BT.reshape(-1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        rows = ctx.rows
        packed_SE = grad.index_select(0, rows.scatter_S)
        if ctx.shared:
            grad_BTE = grad.view(*rows.gather_BT.shape, -1)
            for first, last, start, length in rows.prompts:
                torch.sum(grad_BTE[first:last, :length], dim=0, out=packed_SE[start : start + length])
        return packed_SE, None, None


class _FromRows(torch.autograd.Function):
    """Results of rows back to packed tokens; padding and the further copies of a prompt are left behind."""

    @staticmethod
    def forward(ctx: Any, rows_RE: Tensor, rows: Rows) -> Tensor:
        ctx.rows, ctx.count = rows, len(rows_RE)
        return rows_RE.index_select(0, rows.scatter_S)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        full = grad.new_zeros(ctx.count, grad.shape[1])
        return full.index_copy_(0, ctx.rows.scatter_S, grad), None
