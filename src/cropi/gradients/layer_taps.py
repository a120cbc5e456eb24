"""Taps on a model's layers: what a layer read, met by the gradient at its output, in a backward pass that runs anyway.

The gradient of a linear layer's weight is G = sum_t g_t a_t^T over tokens t: a_t is the layer's input, g_t the loss's
gradient at its output. A tap is an identity function on the layer's output. It saves what it needs of the input through
autograd, so that either kind of gradient checkpointing drops and recomputes it, and meets g in the backward pass. It
makes no second pass and touches no weight, gradient buffer or random state, so it works on the local rows of DDP, FSDP2
and ZeRO, and on layers whose weights are sharded again when it meets g.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cropi.errors import PolicyError

Kind = Literal["linear", "embedding", "norm"]


@dataclass(frozen=True)
class Layer:
    """A module whose trainable parameters a tap can read, and their names in the model. A tied weight has one name."""

    module: nn.Module
    kind: Kind
    weight: str | None  # None: the module has none, or it is frozen
    bias: str | None

    @property
    def parameters(self) -> list[str]:
        return [name for name in (self.weight, self.bias) if name is not None]


class Tap(Protocol):
    """The work of a tap on one layer."""

    def keep(self, layer: Layer, read: Tensor) -> tuple[Tensor, ...]:
        """Tensors to save in the forward pass; `read` is the layer's input, or an embedding's token ids."""

    def meet(self, layer: Layer, gradient: Tensor, *kept: Tensor) -> None:
        """Take the gradient at the layer's output, batch x tokens x width, in the backward pass."""


class _Meeting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, tap: Tap, layer: Layer, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.tap, ctx.layer = tap, layer
        return output.detach()  # not a view of the output: models may write into it

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        kept = ctx.saved_tensors  # once: checkpointing recomputes them for it
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            ctx.tap.meet(ctx.layer, gradient, *kept)
        return gradient, None, None, *[None] * len(kept)


def readable_layers(model: nn.Module) -> list[Layer]:
    """Linear layers (LoRA's included), embeddings and norms with trainable parameters of their own."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = []
    for module in model.modules():
        own = {name: names.get(id(p)) for name, p in module.named_parameters(recurse=False)}
        kind = _kind(module, own)
        if kind is not None and any(own.values()):
            found.append(Layer(module, kind, own.get("weight"), own.get("bias")))
    return found


def _kind(module: nn.Module, own: dict[str, str | None]) -> Kind | None:
    if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
        raise PolicyError(
            "a compiled model ignores taps on its layers, so influence cannot be read while it trains",
            where="trainer.torch_compile",
            fix="leave it out.",
        )
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    is_norm = "Norm" in type(module).__name__ and not list(module.children())
    return "norm" if is_norm and set(own) <= {"weight", "bias"} else None


@contextmanager
def tapped(layers: Sequence[Layer], tap: Tap) -> Iterator[None]:
    """Put a tap on every layer, for the forward and backward passes inside the block."""
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_hook(_hook(layer, tap)).remove)
        yield


def _hook(layer: Layer, tap: Tap) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor | None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        if not torch.is_grad_enabled() or not isinstance(output, Tensor) or not output.requires_grad:
            return None  # reentrant checkpointing passes here first; its second pass has a graph
        if isinstance(module, nn.Linear) and (
            (inputs[0].shape[-1], output.shape[-1]) != (module.in_features, module.out_features)
        ):
            return None  # DeepSeek-V4's linear layer of groups
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            # under autocast a layer computes in its output's type, whatever its input has
            read = inputs[0].to(output.dtype) if layer.kind == "linear" else inputs[0]
            kept = tap.keep(layer, read)
        return _Meeting.apply(output, tap, layer, *kept)

    return hook


@contextmanager
def gradients_tapped(model: nn.Module, meet: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show `meet` the gradient of every trainable parameter, by name, in the passes inside the block.

    It is that of this process's rows, whole: it is met before DDP, FSDP2 or ZeRO reduce, shard or drop it. FSDP2 has
    whole parameters only from when they are gathered in the forward pass.
    """
    found = set[str]()
    with ExitStack() as stack:

        def find(*_: Any) -> None:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and name not in found and not isinstance(parameter, DTensor):
                    found.add(name)
                    stack.callback(parameter.register_hook(partial(meet, name)).remove)

        find()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                stack.callback(module.register_forward_pre_hook(find).remove)
        yield


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, of which ZeRO-3 may have left this process a part alone."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def matrix_parameters(model: nn.Module) -> int:
    """Count the parameters in matrix products: all with two or more axes, except embeddings that are looked up.

    An output head tied to the embeddings counts, through its own module. All experts of a mixture count.
    """
    found: dict[int, int] = {}
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            shapes = {id(p): whole_shape(p) for p in module.parameters(recurse=False)}
            found |= {key: shape.numel() for key, shape in shapes.items() if len(shape) > 1}
    return sum(found.values())


class _Bare(nn.Module):
    """A module without its hooks, which would gather its sharded weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, read: Tensor) -> Any:
        return self.module.forward(read)


def normalised(layer: Layer, read: Tensor) -> Tensor:
    """x, where a norm of weight w computes w * x (or (1 + w) * x) from `read`: its change with the weight."""
    named = layer.module.named_parameters(recurse=False)
    own = {f"module.{name}": torch.zeros(whole_shape(p), device=read.device) for name, p in named}

    def at(weight: Tensor) -> Tensor:
        weights = own | {"module.weight": weight}
        return torch.func.functional_call(_Bare(layer.module), weights, (read.float(),))

    zero = own["module.weight"]
    return at(torch.ones_like(zero)) - at(zero)
