"""Models that have a policy gradient: causal language models whose trainable weights take part in their logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cropi.errors import PolicyError
from cropi.gradients.sharded import forward_replaced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH, READ = 24, 14
"""Tokens of each row of a probe, and the one among them whose logits are read."""

ROUNDING = {torch.bfloat16: 0.1, torch.float16: 0.02}
"""Relative difference of logits that rounding may make, 5e-3 in wider types; of gradients four times as much."""

_LOAD = "load a causal language model, with AutoModelForCausalLM."


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model that a policy is, or that PEFT has wrapped. PolicyError where it cannot be a policy, or
    none of its weights can be trained as it stands."""
    from transformers import PreTrainedModel

    unwrap = getattr(model, "get_base_model", None)  # PEFT
    inner = model if unwrap is None else unwrap()
    if not isinstance(inner, PreTrainedModel):
        raise _refused(model, "it is no transformers model", "give the model itself, without what wraps it.")
    if inner.config.is_encoder_decoder:
        raise _refused(inner, "it is an encoder-decoder model", "use a decoder-only model.")
    if inner.get_output_embeddings() is None:
        raise _refused(inner, "it has no vocabulary head", _LOAD)
    _require_adapters_in_use(model, inner)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise _refused(
            inner,
            "it has no trainable parameters",
            "set requires_grad on those to train; load a PEFT adapter with is_trainable=True.",
        )
    return inner


def _require_adapters_in_use(model: nn.Module, inner: nn.Module) -> None:
    """PEFT's layers say what became of their adapters."""
    for module in model.modules():
        if getattr(module, "merged", None) is True:
            raise _refused(inner, "its adapters are merged into the weights", "call unmerge_adapter() first.")
        if getattr(module, "disable_adapters", None) is True:  # transformers has a method of this name
            raise _refused(inner, "its adapters are switched off", "call enable_adapter_layers() first.")


def require_rows_apart(model: nn.Module) -> None:
    """Refuse a model whose logits at a token depend on later tokens or on other rows, as a policy's never do.

    The gradient of one token's logits must be exactly 0 at all tokens but those up to it, which no rounding blurs. A
    choice (experts of limited capacity) has no gradient, so the logits must also be those of the row alone.
    """
    inner = causal_lm_of(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # A trainer's mixed precision wraps the forward pass of the object, not of its class.
        with forward_replaced(model, partial(type(model).forward, model)):
            _probe(model, inner, trained)
    except PolicyError:
        raise
    except Exception as error:  # a model's own code may raise anything
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        raise _refused(inner, f"its forward pass fails ({reason(error)})", _LOAD) from error
    finally:
        for module, training in modes:
            module.training = training


def _probe(model: nn.Module, inner: PreTrainedModel, trained: Sequence[nn.Parameter]) -> None:
    ids = torch.randint(vocabulary(inner), (2, LENGTH), generator=torch.Generator().manual_seed(0)).to(inner.device)
    with embedded(inner) as found, torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    inputs = list(found.values())
    if logits.shape[:2] != ids.shape or logits.shape[2] < vocabulary(inner):
        raise _refused(inner, f"its logits for {LENGTH} tokens have the shape {list(logits.shape[1:])}", _LOAD)
    require_finite(logits)
    with torch.no_grad():
        alone = model(input_ids=ids[:1], use_cache=False).logits
    coarsest = max((p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda t: torch.finfo(t).eps)
    changed = difference(logits[0], alone[0]) > ROUNDING.get(coarsest, 5e-3)
    gradients = torch.autograd.grad(logits[0, READ].float().square().sum(), [*inputs, *trained], allow_unused=True)
    at_tokens, of_weights = gradients[: len(inputs)], gradients[len(inputs) :]
    beside = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    beside[1] = True
    later = beside.logical_not()
    later[0, : READ + 1] = False
    if leaks(at_tokens, later):
        raise _refused(inner, "its logits depend on later tokens, so it is not causal", "use a causal language model.")
    if changed or leaks(at_tokens, beside):
        raise _refused(inner, "its logits depend on the other rows of a batch", "use another model.")
    if all(gradient is None for gradient in of_weights):
        raise without_effect(inner)


def vocabulary(model: PreTrainedModel) -> int:
    """Tokens that a model knows."""
    rows = model.get_input_embeddings().num_embeddings
    return min(rows, getattr(model.config.get_text_config(), "vocab_size", rows))


@contextmanager
def embedded(model: PreTrainedModel) -> Iterator[dict[nn.Module, Tensor]]:
    """Collect what embeddings give inside the block; it takes part in gradients, and keeps its own after a pass."""
    found: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor):
            return None
        leaf = output if output.requires_grad else output.detach().requires_grad_()
        leaf.retain_grad()
        found[module] = leaf
        return leaf.clone()  # which the model may change in place

    modules = {model.get_input_embeddings(), *(m for m in model.modules() if isinstance(m, nn.Embedding))}
    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def leaks(gradients: Sequence[Tensor | None], hidden: Tensor) -> bool:
    """Whether gradients at embedded tokens (B, T, ...) are other than 0 at tokens (B, T) that must have no effect, or
    nothing was embedded token by token, so that it cannot be known."""
    at_tokens = [g for g in gradients if g is not None and g.shape[: hidden.dim()] == hidden.shape]
    return not at_tokens or any(bool(gradient[hidden].any()) for gradient in at_tokens)


@torch.no_grad()
def difference(found_TE: Tensor, others_TE: Tensor) -> float:
    """Relative difference of what tokens have: the mean over them, since rounding may send one to another expert."""
    sizes_T = others_TE.float().norm(dim=-1).clamp(min=1e-30)
    return float(((found_TE.float() - others_TE.float()).norm(dim=-1) / sizes_T).mean())


def require_finite(logits: Tensor) -> None:
    """PolicyError where logits are not finite numbers."""
    if not bool(torch.isfinite(logits).all()):
        raise PolicyError(
            "the policy gives logits that are not finite numbers",
            where="policy",
            fix="check the weights; a policy that has diverged cannot be scored.",
        )


def without_effect(model: PreTrainedModel) -> PolicyError:
    """The error for a model of which nothing that is trainable acts."""
    return _refused(model, "its logits depend on none of its trainable parameters", "train those that it uses.")


def reason(error: Exception) -> str:
    """The first line of an error that another library raised."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _refused(model: nn.Module, why: str, fix: str) -> PolicyError:
    return PolicyError(f"{type(model).__name__} cannot be scored: {why}", where="policy", fix=fix)
