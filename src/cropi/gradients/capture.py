"""Hooks that capture the input and output gradient of every module with trainable weights, without weight gradients.

The weights are frozen for the pass, so the backward pass runs through activations only: 2 forward passes of work in all
instead of 3. The factors of each weight's gradient go to a `FactorReader` during the backward pass:

- linear layer: G = sum_t g_t a_t^T from inputs a and output gradients g;
- embedding: row x_t of G grows by g_t;
- norm scales and other vectors: one gradient per token, from a scale with one entry per token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cropi.fsdp import ShardedParameters, outline
from cropi.gradients.attention import unsupported
from cropi.gradients.packing import Segment, Span

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Kind = Literal["linear", "embedding", "norm", "vectors"]
Hook = Callable[[nn.Module, Any, Tensor], None]


class FactorReader:
    """Consumer of the factors of a gradient; this one ignores them, which is the lowest cost of the engine.

    Names are parameter names; tied parameters share one. `begin` opens a pack and `commit` closes it. `undo` drops an
    unfinished pack, or all results and returns False.
    """

    row_bytes = 0  # memory per result row of a pack

    def begin(self, segments: Sequence[Segment]) -> None: ...

    def commit(self) -> None: ...

    def undo(self) -> bool:
        return True

    def linear(self, name: str, inputs_TI: Tensor, grads_TO: Tensor, spans: Sequence[Span]) -> None:
        """A weight (O, I) whose gradient over a span is grads^T inputs."""

    def rows(self, name: str, ids_T: Tensor, grads_TI: Tensor, spans: Sequence[Span]) -> None:
        """A weight (O, I) whose row ids[t] gets grads[t]."""

    def vector(self, name: str, grads_TP: Tensor, spans: Sequence[Span]) -> None:
        """A parameter whose gradient over a span is the sum of the rows of grads."""


@dataclass(frozen=True)
class _Owner:
    """A module with trainable parameters of its own, and their names."""

    kind: Kind
    module: nn.Module
    path: str
    names: dict[str, str]


@dataclass(frozen=True)
class Idle:
    """Trainable weights that text input does not use, such as a vision tower: their gradient is zero."""

    parameters: Collection[str] = ()
    modules: Sequence[nn.Module] = ()  # modules with such parameters that were not called


@contextmanager
def watch_calls(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Collect the modules that are called inside the block."""
    called: set[nn.Module] = set()
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(lambda module, _: called.add(module)).remove)
        yield called


def find_idle(model: nn.Module, logits: Sequence[Tensor], called: Collection[nn.Module]) -> Idle:
    """Find the trainable weights that autograd's graph does not connect to the logits."""
    reached, seen, waiting = set[int](), set[Any](), [tensor.grad_fn for tensor in logits]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(id(getattr(node, "variable", None)))
            waiting += [following for following, _ in node.next_functions]
    missed = {id(p): name for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached}
    holders = [module for module in model.modules() if any(id(p) in missed for p in module._parameters.values())]
    return Idle(missed.values(), [module for module in holders if module not in called])


class Capture:
    """Hooks on the modules of one model. Raises PolicyError with the first module whose weights are not covered."""

    def __init__(
        self, model: nn.Module, causal_lm: PreTrainedModel, head: nn.Module, shards: ShardedParameters, idle: Idle
    ) -> None:
        self._model, self._device = causal_lm, shards.device
        self._uncalled = idle.modules
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.trainable: dict[str, Tensor] = {
            name: outline(p, shards.device) for name, p in self._trained.items() if name not in idle.parameters
        }
        self._owners: list[_Owner] = []
        for path, module in model.named_modules():
            own = {attribute: names[id(p)] for attribute, p in module._parameters.items() if p is not None}
            own = {attribute: name for attribute, name in own.items() if name in self.trainable}
            if own and module is not head:
                with shards.gathered(model, path):
                    self._owners.append(_Owner(self._kind(module, own), module, path, own))
        self.head_names = {
            attribute: names[id(p)]
            for attribute, p in head._parameters.items()
            if p is not None and names[id(p)] in self.trainable
        }
        products = [self.head_names, *(owner.names for owner in self._owners if owner.kind == "linear")]
        self.matrices = {own["weight"] for own in products if "weight" in own}
        self._token_dims: dict[str, int] = {}
        self._calls: Counter[str] = Counter()

    def repeated(self) -> set[str]:
        """Return the names that one pass reports in several parts: the head's, which comes in chunks, those shared by
        modules, and those of a module called twice in the last pass."""
        parts = Counter(
            name for owner in self._owners for name in owner.names.values() for _ in range(self._calls[owner.path])
        )
        return {name for name, count in parts.items() if count > 1} | set(self.head_names.values())

    def _kind(self, module: nn.Module, own: dict[str, str]) -> Kind:
        forward = type(module).forward
        if forward is nn.Linear.forward:
            return "linear"
        if isinstance(module, nn.Embedding) and set(own) == {"weight"} and self._plain_rows(module):
            return "embedding"
        if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward) and len(module.normalized_shape) == 1:  # type: ignore[arg-type]
            return "norm"
        if all(getattr(module, attribute).dim() == 1 for attribute in own) and self._acts_by_token(module, own):
            return "vectors"
        raise unsupported(
            self._model,
            f"it does not cover the weights of module type {type(module).__name__} ({next(iter(own.values()))})",
        )

    @staticmethod
    def _plain_rows(module: nn.Embedding) -> bool:
        """Whether an embedding returns rows of its weight times one number (as Gemma's does)."""
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            return False
        with torch.no_grad():
            ids = torch.arange(min(4, module.num_embeddings), device=module.weight.device)
            try:
                given = module.forward(ids).float()
            except (IndexError, TypeError, RuntimeError):  # its input is not ids
                return False
            stored = module.weight[ids].float() * embedding_scale(module)
        return given.shape == stored.shape and bool(torch.allclose(given, stored, rtol=1e-2, atol=1e-6))

    def _acts_by_token(self, module: nn.Module, own: dict[str, str]) -> bool:
        """Whether a module with vector weights acts on each token alone and accepts weights that differ by token."""
        size = max(getattr(module, attribute).shape[0] for attribute in own)
        first = getattr(module, next(iter(own)))
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self._device, first.dtype)

        inputs, weights = draw(1, 3, size), {attribute: draw(1, 3, size) for attribute in own}
        before = dict(module._parameters)
        held: dict[str, Any] = module._parameters
        try:
            with torch.no_grad():
                held.update(weights)
                together = module.forward(inputs)
                apart = []
                for token in range(3):
                    held.update({attribute: weights[attribute][0, token] for attribute in own})
                    apart.append(module.forward(inputs[:, token : token + 1]))
            return bool(torch.allclose(together, torch.cat(apart, dim=1), rtol=1e-3, atol=1e-3))
        except (RuntimeError, TypeError, AttributeError, ValueError):  # not a scale per channel
            return False
        finally:
            held.update(before)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Freeze all trainable parameters inside the block."""
        parameters = list(self._trained.values())
        before = [parameter.requires_grad for parameter in parameters]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, trained in zip(parameters, before, strict=True):
                parameter.requires_grad_(trained)

    @contextmanager
    def hooks(self, reader: FactorReader, spans: Sequence[Span], tokens: int) -> Iterator[None]:
        """Report a forward and backward pass inside the block to the reader. Raises PolicyError if a module with
        trainable weights is never called, because its weights then act where no hook sees them."""
        self._calls.clear()
        with ExitStack() as stack:
            stack.enter_context(self.frozen())
            hooks = {"linear": self._on_linear, "embedding": self._on_embedding, "norm": self._on_norm}
            for owner in self._owners:
                if owner.kind == "vectors":
                    stack.enter_context(self._per_token(owner, reader, spans, tokens))
                else:
                    hook = hooks[owner.kind](owner, reader, spans, tokens)
                    stack.callback(owner.module.register_forward_hook(hook).remove)
            for module in self._uncalled:
                stack.callback(module.register_forward_pre_hook(self._refuse).remove)
            first = self._model.get_input_embeddings()
            stack.callback(first.register_forward_hook(_require_grad).remove)
            yield
        for owner in self._owners:
            if not self._calls[owner.path]:
                raise unsupported(self._model, f"its module {owner.path} holds trainable weights but was never called")

    def _refuse(self, module: nn.Module, args: Any) -> None:
        raise unsupported(self._model, f"it calls its {type(module).__name__} for some texts only")

    def _on_linear(self, owner: _Owner, reader: FactorReader, spans: Sequence[Span], tokens: int) -> Hook:
        weight, bias = owner.names.get("weight"), owner.names.get("bias")

        def after_forward(module: nn.Module, args: Any, output: Tensor) -> None:
            self._calls[owner.path] += 1
            inputs_TI = args[0].detach().reshape(-1, args[0].shape[-1])
            if len(inputs_TI) != tokens:
                raise unsupported(self._model, f"its module {owner.path} does not act on each token once")

            def after_backward(grad: Tensor) -> None:
                grads_TO = grad.reshape(-1, grad.shape[-1])
                if weight is not None:
                    reader.linear(weight, inputs_TI, grads_TO, spans)
                if bias is not None:
                    reader.vector(bias, grads_TO, spans)

            output.register_hook(after_backward)

        return after_forward

    def _on_embedding(self, owner: _Owner, reader: FactorReader, spans: Sequence[Span], _: int) -> Hook:
        def after_forward(module: nn.Module, args: Any, output: Tensor) -> None:
            self._calls[owner.path] += 1
            ids_T = args[0].reshape(-1)
            scale, padding = embedding_scale(module), module.padding_idx

            def after_backward(grad: Tensor) -> None:
                grads_TI = grad.reshape(len(ids_T), -1)
                if scale != 1.0:
                    grads_TI = grads_TI * scale
                if padding is not None:  # torch gives this row no gradient, wherever the token stands
                    grads_TI = grads_TI.masked_fill((ids_T == padding)[:, None], 0.0)
                reader.rows(owner.names["weight"], ids_T, grads_TI, spans)

            _require_grad(module, args, output)
            output.register_hook(after_backward)

        return after_forward

    def _on_norm(self, owner: _Owner, reader: FactorReader, spans: Sequence[Span], tokens: int) -> Hook:
        """Recompute the normalised input: torch's own norms refuse weights that differ by token."""

        def after_forward(module: nn.Module, args: Any, output: Tensor) -> None:
            self._calls[owner.path] += 1
            with torch.no_grad():
                if isinstance(module, nn.LayerNorm):
                    plain = F.layer_norm(args[0], module.normalized_shape, None, None, module.eps)
                else:
                    assert isinstance(module, nn.RMSNorm)
                    plain = F.rms_norm(args[0], module.normalized_shape, None, module.eps)

            dim = self._token_dim(owner, output, tokens)

            def after_backward(grad: Tensor) -> None:
                for attribute, factor in (("weight", plain), ("bias", 1.0)):
                    if attribute in owner.names:
                        # several vectors of one token (heads) share the parameter: add their gradients
                        parts = (grad * factor).movedim(dim, 0).reshape(tokens, -1, grad.shape[-1])
                        reader.vector(owner.names[attribute], parts.sum(dim=1), spans)

            output.register_hook(after_backward)

        return after_forward

    def _token_dim(self, owner: _Owner, values: Tensor, tokens: int) -> int:
        """Find the dimension of a module's values that runs over tokens, from the first pass: it alone has the token
        count."""
        if owner.path not in self._token_dims:
            found = [dim for dim, size in enumerate(values.shape[:-1]) if size == tokens]
            if len(found) != 1:
                raise unsupported(self._model, f"its module {owner.path} does not act on each token once")
            self._token_dims[owner.path] = found[0]
        return self._token_dims[owner.path]

    @contextmanager
    def _per_token(self, owner: _Owner, reader: FactorReader, spans: Sequence[Span], tokens: int) -> Iterator[None]:
        """Give a module weights with one entry per token, call by call, and read their gradients."""
        module, originals = owner.module, dict[str, Any]()
        held: dict[str, Any] = module._parameters  # written directly: torch accepts parameters only

        def before_forward(module: nn.Module, args: Any) -> None:
            self._calls[owner.path] += 1
            shape = [1] * args[0].dim()
            shape[self._token_dim(owner, args[0], tokens)], shape[-1] = tokens, -1
            for attribute, name in owner.names.items():
                originals[attribute] = held[attribute]
                leaf = held[attribute].detach().expand(shape).requires_grad_()

                def read(leaf: Tensor, name: str = name) -> None:
                    assert leaf.grad is not None
                    reader.vector(name, leaf.grad.reshape(-1, leaf.shape[-1]), spans)
                    leaf.grad = None

                leaf.register_post_accumulate_grad_hook(read)
                held[attribute] = leaf

        def put_back(*_: Any) -> None:
            for attribute, original in originals.items():
                if not isinstance(held[attribute], nn.Parameter):  # else FSDP has restored its shard
                    held[attribute] = original
            originals.clear()

        with ExitStack() as stack:
            stack.callback(put_back)
            stack.callback(module.register_forward_pre_hook(before_forward).remove)
            stack.callback(module.register_forward_hook(put_back).remove)
            yield


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    """Make the output require grad: the pass must reach the first adapter even if earlier layers are not trained."""
    if not output.requires_grad:
        output.requires_grad_()


def embedding_scale(module: nn.Module) -> float:
    """Return the factor of an embedding's rows: 1, or `embed_scale` (Gemma)."""
    return float(getattr(module, "embed_scale", 1.0))
