"""Layers whose weight gradient can be read in a backward pass, as the two factors of a sum over tokens.

The gradient of a weight W (m x n) is G = sum_t u_t v_t^T. One factor comes from the layer's input and is known in the
forward pass; the other is the gradient g of the layer's output.

- `nn.Linear`: u = g, v = input. GPT-2's `Conv1D`, whose weight is transposed: u = input, v = g.
- `nn.Embedding`: u = one-hot of the token id, v = g.
- Norms and biases: a vector per token, g * normalised input or g.

An identity autograd function on the layer's output saves what is kept of the input and meets g. Saved tensors pass
through gradient checkpointing of both kinds; module hooks would fire twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cropi.errors import PolicyError
from cropi.gradients.capture import embedding_scale
from cropi.gradients.sharded_parameters import ShardedParameters

LINEAR, TRANSPOSED, EMBEDDING, NORM = "linear", "transposed", "embedding", "norm"


@dataclass(frozen=True)
class Layer:
    """A module with trainable weights. `weight` and `bias` are parameter names, None where not trained."""

    path: str
    module: nn.Module
    kind: str
    weight: str | None
    bias: str | None

    @property
    def nested(self) -> bool:
        """Whether the module stands in a list inside a list, as experts do: its input may be some of the tokens."""
        return sum(step.isdigit() for step in self.path.split(".")) > 1


class Pass(Protocol):
    """What one forward and backward pass does at each layer."""

    rows: int
    """Sequences of the pass."""

    def keep(self, layer: Layer, values: Tensor) -> Tensor | None:
        """Return what to save of a layer's input: rows x tokens x width, or ids rows x tokens."""

    def meet(self, layer: Layer, kept: Tensor | None, grad: Tensor) -> None:
        """Use the gradient of the output, rows x tokens x width."""

    def skip(self, layer: Layer, why: str) -> None:
        """Note that a layer is not read in this pass."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel. Raises PolicyError if torch.compile replaces module calls."""
    while isinstance(model, DistributedDataParallel):
        model = model.module
    compiled = getattr(torch._dynamo.eval_frame, "OptimizedModule", ())
    for name, module in model.named_modules():
        if isinstance(module, compiled) or module._compiled_call_impl is not None:
            raise PolicyError(
                f"gradients cannot be read while training: torch.compile has replaced {name or 'the model'}, and "
                "compiled code does not call the hooks that read them",
                where="model",
                fix="train without torch.compile (torch_compile=False in the trainer's arguments).",
            )
    return model


def find_layers(model: nn.Module) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers that can be read, and why each other trainable parameter cannot, by parameter name."""
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    layers, unread, shards = list[Layer](), dict[str, str](), ShardedParameters(model)
    for path, module in model.named_modules():
        own = {key: names[id(p)] for key, p in module._parameters.items() if p is not None and id(p) in names}
        if not own:
            continue
        kind = None
        if set(own) <= {"weight", "bias"}:
            with shards.gathered(model, path):
                kind = _kind(module)
        if kind is None:
            unread |= dict.fromkeys(own.values(), f"{type(module).__name__} is not a layer that can be read")
        else:
            layers.append(Layer(path, module, kind, own.get("weight"), own.get("bias")))
    read = {name for layer in layers for name in (layer.weight, layer.bias)}
    return layers, {name: why for name, why in unread.items() if name not in read}


def _kind(module: nn.Module) -> str | None:
    if type(module).forward is nn.Linear.forward:
        return LINEAR
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return TRANSPOSED
    if isinstance(module, nn.Embedding):
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return EMBEDDING if plain and _looks_up(module) else None
    return NORM if _is_norm(module) else None


@torch.no_grad()
def _looks_up(module: nn.Embedding) -> bool:
    """Whether the module returns rows of its weight times one number."""
    ids = torch.arange(min(4, module.num_embeddings), device=module.weight.device)
    try:
        found = module.forward(ids)
    except (IndexError, TypeError, RuntimeError, ValueError):  # its input is not ids
        return False
    stored = module.weight[ids] * embedding_scale(module)
    return found.shape == stored.shape and torch.allclose(found.float(), stored.float(), rtol=1e-2, atol=1e-6)


@torch.no_grad()
def _is_norm(module: nn.Module) -> bool:
    """Whether y = w * x_hat + b or (1 + w) * x_hat, with x_hat as `normalised` computes it."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is None or weight.dim() != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, len(weight), generator=generator).to(weight.device, weight.dtype)
    try:
        found, plain = module.forward(values), normalised(module, values)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    if not isinstance(found, Tensor) or found.shape != plain.shape:
        return False
    shift = 0.0 if bias is None else bias
    wanted = (weight * plain + shift, (1 + weight) * plain + shift)
    return any(torch.allclose(found.float(), each.float(), rtol=2e-2, atol=2e-2) for each in wanted)


def normalised(module: nn.Module, values: Tensor) -> Tensor:
    """Normalise as the module does, without its scale; float32 or wider."""
    wide, width = widened(values), (values.shape[-1],)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(wide, width, None, None, module.eps)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None:
        eps = torch.finfo(values.dtype).eps
    return wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def widened(values: Tensor) -> Tensor:
    """Return float32, or wider if the values are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def project(values: Tensor, basis: Tensor) -> Tensor:
    """Multiply ... x n by n x k into float32 or wider, whatever autocast says."""
    if values.is_cuda and values.dtype in (torch.bfloat16, torch.float16):
        flat = values.reshape(-1, values.shape[-1])
        found = torch.mm(flat, basis.to(values.dtype), out_dtype=torch.float32)
        return found.view(*values.shape[:-1], basis.shape[1])
    wide = widened(values)
    return wide @ basis.to(wide.dtype)


def input_side(layer: Layer, kept: Tensor, basis: Tensor) -> Tensor:
    """Project what a layer saw, rows x tokens x k. Embeddings look their ids up, with torch's rule for padding."""
    if layer.kind != EMBEDDING:
        return project(kept, basis)
    found, padding = F.embedding(kept, basis), layer.module.padding_idx
    scale = embedding_scale(layer.module)
    if scale != 1.0:
        found = found * scale
    if padding is not None:
        found = found.masked_fill((kept == padding)[..., None], 0.0)  # type: ignore[operator]
    return found


class _Meet(torch.autograd.Function):
    """The identity. Its backward pass hands the output's gradient and the saved tensors to a function."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, meet: Callable[..., None], *kept: Tensor) -> Tensor:
        ctx.meet = meet
        ctx.save_for_backward(*kept)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # once: non-reentrant checkpointing refuses a second look
        ctx.meet(grad, *kept)
        return grad, None, *[None] * len(kept)


class Watch:
    """Hooks of one pass on some layers of a model. After it, a backward pass raises RuntimeError at these layers."""

    def __init__(self, model: nn.Module, layers: list[Layer], work: Pass) -> None:
        self._model, self._layers, self._work = model, layers, work
        self._tokens: int | None = None
        self._open = False
        self.lookups: list[Tensor] = []
        """Outputs of embeddings, before the identity: backward to these reaches every layer."""
        self.met = 0
        """Layers met in the backward pass, with repetitions."""

    @contextmanager
    def hooks(self, *, lookups: bool = False) -> Iterator[None]:
        """Put the hooks on for the block. With `lookups`, collect the outputs of embeddings."""
        with ExitStack() as stack:
            first = _input_embedding(self._model)
            if first is not None:
                stack.callback(first.register_forward_pre_hook(self._note_tokens).remove)
            if lookups:
                for module in self._model.modules():
                    if isinstance(module, nn.Embedding):
                        stack.callback(module.register_forward_hook(self._note_lookup).remove)
            for layer in self._layers:
                hook = layer.module.register_forward_hook(self._hook(layer), with_kwargs=True)
                stack.callback(hook.remove)
            self._open = True
            stack.callback(self._close)
            yield

    def _close(self) -> None:
        self._open = False
        self.lookups.clear()

    def _note_tokens(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled() or not args or args[0].dim() != 2:
            return
        if args[0].shape[0] != self._work.rows:
            raise ValueError(f"{self._work.rows} row numbers for a batch of {args[0].shape[0]} sequences")
        self._tokens = args[0].shape[1]

    def _note_lookup(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            self.lookups.append(output if output.requires_grad else output.requires_grad_())

    def _hook(self, layer: Layer) -> Callable[..., Tensor | None]:
        def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not torch.is_grad_enabled() or not isinstance(output, Tensor) or not output.requires_grad:
                return None
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if len(tensors) != 1:
                self._work.skip(layer, f"it is called with {len(tensors)} tensors")
                return None
            values = self._by_row(layer, tensors[0].detach(), 0 if layer.kind == EMBEDDING else 1)
            if values is None:
                self._work.skip(layer, "its input does not have one sequence after another")
                return None
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                kept = self._work.keep(layer, values)
            return _Meet.apply(output, self._meeting(layer), *(() if kept is None else (kept,)))

        return after_forward

    def _meeting(self, layer: Layer) -> Callable[..., None]:
        def meet(grad: Tensor, kept: Tensor | None = None) -> None:
            if not self._open:
                raise RuntimeError("the block that reads gradients must enclose the backward pass, too")
            self.met += 1
            with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
                self._work.meet(layer, kept, grad.reshape(self._work.rows, -1, grad.shape[-1]))

        return meet

    def _by_row(self, layer: Layer, values: Tensor, width: int) -> Tensor | None:
        """Reshape to rows x tokens (x width), None if sequences do not follow each other."""
        rows, places = self._work.rows, values.shape[: values.dim() - width]
        shape = (rows, -1, *values.shape[values.dim() - width :])
        if rows == 1:
            return values.reshape(shape)
        by_sequence = len(places) > 1 and places[0] == rows
        if layer.nested:
            fits = by_sequence and places[1] == self._tokens
        else:
            fits = by_sequence or (len(places) == 1 and self._tokens is not None and places[0] == rows * self._tokens)
        return values.reshape(shape) if fits else None


def _input_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_input_embeddings", None)
    try:
        return None if getter is None else getter()
    except (AttributeError, NotImplementedError):
        return None


def parameter_shapes(model: nn.Module, layers: list[Layer]) -> tuple[dict[str, torch.Size], dict[str, torch.Size]]:
    """Return the shapes of the weight matrices and of the vectors that the layers hold, by parameter name."""
    shapes: Mapping[str, torch.Size] = {name: p.shape for name, p in model.named_parameters()}
    matrices = {layer.weight: shapes[layer.weight] for layer in layers if layer.weight and layer.kind != NORM}
    vectors = {layer.bias: shapes[layer.bias] for layer in layers if layer.bias}
    vectors |= {layer.weight: shapes[layer.weight] for layer in layers if layer.weight and layer.kind == NORM}
    return matrices, vectors
