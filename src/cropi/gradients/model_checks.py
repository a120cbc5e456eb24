"""Checks of a policy: a causal language model whose gradients the engine reproduces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from cropi.errors import PolicyError, first_line
from cropi.fsdp import forward_replaced
from cropi.gradients.attention import own_attention, pack_rows, unsupported
from cropi.gradients.capture import FactorReader
from cropi.gradients.packing import Pack, Segment, make_pack
from cropi.policy import evaluating, is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cropi.gradients.engine import Engine

LENGTH, READ = 24, 14
"""Tokens of each test row, and the position whose logits are read."""

ROUNDING = {torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest relative difference of logits by rounding, 5e-3 in wider types; for gradients four times as much."""

_LOAD = "load a causal language model, with AutoModelForCausalLM."


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model of a policy, unwrapped from PEFT. Raises PolicyError if it cannot be a policy or
    has no trainable weight."""
    from transformers import PreTrainedModel

    unwrap = getattr(model, "get_base_model", None)  # PEFT
    inner = model if unwrap is None else unwrap()
    if not isinstance(inner, PreTrainedModel):
        raise _refused(model, "it is no transformers model", "pass the model itself, without a wrapper.")
    if inner.config.is_encoder_decoder:
        raise _refused(inner, "it is an encoder-decoder model", "use a decoder-only model.")
    if inner.get_output_embeddings() is None:
        raise _refused(inner, "it has no vocabulary head", _LOAD)
    if inner.dtype == torch.float16:
        raise _refused(
            inner, "its weights are float16, in which small gradients become 0", "load it in bfloat16 or float32."
        )
    _require_adapters_in_use(model, inner)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise _refused(
            inner,
            "it has no trainable parameters",
            "set requires_grad on those to train; load a PEFT adapter with is_trainable=True.",
        )
    return inner


def _require_adapters_in_use(model: nn.Module, inner: nn.Module) -> None:
    """Raise PolicyError if PEFT adapters are merged or disabled."""
    for module in model.modules():
        if getattr(module, "merged", None) is True:
            raise _refused(inner, "its adapters are merged into the weights", "call unmerge_adapter() first.")
        if getattr(module, "disable_adapters", None) is True:  # transformers has a method of this name
            raise _refused(inner, "its adapters are switched off", "call enable_adapter_layers() first.")


def require_independent_rows(model: nn.Module) -> None:
    """Raise PolicyError if the logits at a token depend on later tokens or on other rows.

    The gradient of one token's logits must be exactly 0 at later tokens and other rows, which rounding cannot hide. A
    discrete choice (experts of limited capacity) has no gradient, so the row alone must also give the same logits.
    """
    inner = causal_lm_of(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with evaluating(model), _own_forward(model):
            _probe(model, inner, trained)
    except PolicyError:
        raise
    except Exception as error:  # a model's own code may raise anything
        if is_out_of_memory(error):
            raise
        raise _refused(inner, f"its forward pass fails ({type(error).__name__}: {first_line(error)})", _LOAD) from error


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
    changed = relative_difference(logits[0], alone[0]) > ROUNDING.get(coarsest, 5e-3)
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
    """Return the size of a model's vocabulary."""
    rows = model.get_input_embeddings().num_embeddings
    return min(rows, getattr(model.config.get_text_config(), "vocab_size", rows))


@contextmanager
def embedded(model: PreTrainedModel) -> Iterator[dict[nn.Module, Tensor]]:
    """Collect the outputs of embeddings inside the block, as tensors that retain their gradient."""
    found: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor):
            return None
        leaf = output if output.requires_grad else output.detach().requires_grad_()
        leaf.retain_grad()
        found[module] = leaf
        return leaf.clone()  # the model may change it in place

    modules = {model.get_input_embeddings(), *(m for m in model.modules() if isinstance(m, nn.Embedding))}
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(keep).remove)
        yield found


def leaks(gradients: Sequence[Tensor | None], hidden: Tensor) -> bool:
    """Whether gradients at embedded tokens (B, T, ...) are non-zero at tokens (B, T) that must have no effect.

    Also true if nothing was embedded token by token, because then it cannot be known.
    """
    at_tokens = [g for g in gradients if g is not None and g.shape[: hidden.dim()] == hidden.shape]
    return not at_tokens or any(bool(gradient[hidden].any()) for gradient in at_tokens)


@torch.no_grad()
def relative_difference(found_TE: Tensor, others_TE: Tensor) -> float:
    """Compute the mean relative difference over tokens; rounding may route a single token to another expert."""
    sizes_T = others_TE.float().norm(dim=-1).clamp(min=1e-30)
    return float(((found_TE.float() - others_TE.float()).norm(dim=-1) / sizes_T).mean())


def require_finite(logits: Tensor) -> None:
    """Raise PolicyError if logits are not finite numbers."""
    if not bool(torch.isfinite(logits).all()):
        raise PolicyError(
            "the policy gives logits that are not finite numbers",
            where="policy",
            fix="check the weights; a policy that has diverged cannot be scored.",
        )


def without_effect(model: PreTrainedModel) -> PolicyError:
    """Make the error for a model whose trainable weights have no effect."""
    return _refused(model, "its logits depend on none of its trainable parameters", "train those that it uses.")


def _refused(model: nn.Module, why: str, fix: str) -> PolicyError:
    return PolicyError(f"{type(model).__name__} cannot be scored: {why}", where="policy", fix=fix)


def example_segment(model: PreTrainedModel, longest: float) -> Segment:
    """Draw a segment of random tokens, with completions of several lengths."""
    rows = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        count = max(1, int(count * min(1, longest / 40)))
        return torch.randint(rows, (count,), generator=generator).tolist()

    return Segment(0, draw(23), [draw(17), draw(1), draw(12)], [1.0] * 3, None)


def models_own_logits(engine: Engine, segment: Segment) -> list[Tensor]:
    """Compute a segment's logits by the model's own forward pass, and fit the head's constants to them."""
    found = []
    with own_attention(engine.causal_lm), _own_forward(engine.model), engine.head.watched() as seen:
        for completion in segment.completions:
            ids = torch.tensor([segment.prompt_ids + completion[:-1]], device=engine.device)
            found.append(engine.model(input_ids=ids, use_cache=False).logits[0])
    engine.shards.release()
    engine.head.fit(seen, found)
    return [logits[len(segment.prompt_ids) - 1 :] for logits in found]


def _own_forward(model: nn.Module) -> AbstractContextManager[None]:
    """Use the forward pass of the model's class: trainers wrap that of the object in autocast."""
    return forward_replaced(model, partial(type(model).forward, model))


def check_logits(engine: Engine, segment: Segment, theirs_EW: Tensor) -> float:
    """Compare the logits of a small pack with the model's own. Returns bytes of activations kept per token."""
    pack = make_pack([segment], engine.device)
    ours: list[tuple[Tensor, torch.dtype]] = []

    def at_head(hidden_SH: Tensor) -> Tensor:
        ours.append((engine.head.logits(hidden_SH.index_select(0, pack.sources_E)), hidden_SH.dtype))
        return torch.zeros_like(hidden_SH)

    with (
        _kept_activations(engine.model) as kept,
        engine.capture.hooks(FactorReader(), pack.spans, pack.tokens),
        pack_rows(engine.causal_lm, pack.rows),
    ):
        engine.forward(pack, at_head).backward()
    engine.shards.release()
    [(ours_EW, dtype)] = ours
    require_finite(theirs_EW)
    gap = relative_difference(ours_EW, theirs_EW)
    if gap > ROUNDING.get(dtype, 5e-3):
        raise unsupported(
            engine.causal_lm,
            f"its own logits differ from the engine's by {gap:.2g} of their size on a test sequence",
        )
    return sum(kept.values()) / pack.tokens


def check_neighbours(engine: Engine) -> None:
    """Raise PolicyError if a token's hidden state depends on more than its own trajectory up to it.

    The gradient must be exactly 0 elsewhere in the pack, which rounding cannot hide, and the order of the trajectories
    must not matter.
    """
    members, hidden = _test_segments(engine), list[Tensor]()
    for order in (members[::-1], members):
        pack, start = make_pack(order, engine.device), order[0].tokens
        own = [*range(start, start + 5), start + 5 + 6]  # the prompt and the first token of its last completion

        def at_head(hidden_SH: Tensor, start: int = start, last: int = own[-1]) -> Tensor:
            require_finite(hidden_SH)
            hidden.append(hidden_SH[start : start + members[1].tokens])
            gradient_SH = torch.zeros_like(hidden_SH)
            gradient_SH[last] = hidden_SH[last]
            return gradient_SH

        others_1S = torch.ones(1, pack.tokens, dtype=torch.bool, device=engine.device)
        others_1S[0, own] = False
        if leaks([tensor.grad for tensor in _embedding_outputs(engine, pack, at_head).values()], others_1S):
            why = "tokens see other trajectories outside attention (a state-space, recurrent or convolutional layer)"
            raise unsupported(engine.causal_lm, why)
    if relative_difference(hidden[0], hidden[1]) > 0.1 * ROUNDING.get(hidden[0].dtype, 5e-3):
        why = "its tokens depend on their place in a pack (it ignores position_ids)"
        raise unsupported(engine.causal_lm, why)


def check_gradients(engine: Engine) -> None:
    """Raise PolicyError if the surrogate's gradient at a pack's tokens differs from that of the model's own passes, one
    trajectory at a time."""
    members, first = _test_segments(engine), engine.causal_lm.get_input_embeddings()
    pack = make_pack(members, engine.device)
    ours = _embedding_outputs(
        engine, pack, lambda hidden_SH: engine.head(hidden_SH, pack, engine.settings, FactorReader(), {})[1]
    )[first].grad
    assert ours is not None
    theirs, start = torch.zeros_like(ours), 0
    for member in members:
        begin, count = start + len(member.prompt_ids), len(member.prompt_ids)
        for completion, scale in zip(member.completions, member.scales, strict=True):
            places = [*range(start, start + count), *range(begin, begin + len(completion) - 1)]
            theirs[0, places] += scale * _own_gradient(engine, member.prompt_ids, completion)
            begin += len(completion) - 1
        start = begin
    engine.shards.release()
    gap = relative_difference(ours[0], theirs[0])
    if gap > 4 * ROUNDING.get(ours.dtype, 5e-3):
        raise unsupported(engine.causal_lm, f"its own gradients differ from the engine's by {gap:.1%} on a test pack")


def _test_segments(engine: Engine) -> list[Segment]:
    """Draw a few trajectories, too short for length-dependent rotary positions. Their 43 tokens match no other size in
    a model."""
    draw = partial(torch.randint, vocabulary(engine.causal_lm), generator=torch.Generator().manual_seed(0))
    return [
        Segment(
            row,
            draw((5,)).tolist(),
            [draw((n,)).tolist() for n in lengths],
            [1.0, -0.5, 2.0][-len(lengths) :],
            None,
        )
        for row, lengths in enumerate([[5, 4], [7, 1, 8], [9]])
    ]


def _embedding_outputs(engine: Engine, pack: Pack, at_head: Callable[[Tensor], Tensor]) -> dict[nn.Module, Tensor]:
    """Run a pack and return the outputs of its embeddings, with their gradients."""
    with (
        engine.capture.hooks(FactorReader(), pack.spans, pack.tokens),
        pack_rows(engine.causal_lm, pack.rows),
        embedded(engine.causal_lm) as found,
    ):
        engine.forward(pack, at_head).backward()
    return found


def _own_gradient(engine: Engine, prompt_ids: list[int], completion: list[int]) -> Tensor:
    """Compute the gradient of a trajectory's log-probability at its embedded tokens (all but the last), by the model's
    own pass."""
    ids_1T = torch.tensor([prompt_ids + completion], device=engine.device)
    with (
        own_attention(engine.causal_lm),
        _own_forward(engine.model),
        engine.capture.frozen(),
        embedded(engine.causal_lm) as found,
    ):
        logits_TW = engine.model(input_ids=ids_1T[:, :-1], use_cache=False).logits[0, len(prompt_ids) - 1 :]
        logits_TW = logits_TW.to(torch.promote_types(logits_TW.dtype, torch.float32)) / engine.settings.temperature
        logits_TW.log_softmax(dim=-1).gather(1, ids_1T[0, len(prompt_ids) :, None]).sum().backward()
    gradient = found[engine.causal_lm.get_input_embeddings()].grad
    assert gradient is not None
    return gradient[0]


def _plain(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return type(tensor) in {Tensor, nn.Parameter}


@contextmanager
def _kept_activations(model: nn.Module) -> Iterator[dict[int, int]]:
    """Collect the bytes of activations that a forward pass keeps for its backward pass, by address, without weights.

    Activations are plain tensors. A tensor of another class is a quantised weight, whose storage cannot be queried.
    """
    weights, found = set[int](), dict[int, int]()

    def note_weights(module: nn.Module, args: Any) -> None:
        weights.clear()
        weights.update(p.untyped_storage().data_ptr() for p in module._parameters.values() if _plain(p))

    def note(tensor: Tensor) -> Tensor:
        if _plain(tensor) and tensor.untyped_storage().data_ptr() not in weights:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with ExitStack() as stack:
        for module in model.modules():
            if module._parameters:  # full parameters of a sharded module exist only during its call
                stack.callback(module.register_forward_pre_hook(note_weights).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor))
        yield found
