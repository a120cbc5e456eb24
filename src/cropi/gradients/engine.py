"""The engine: one forward and one activation backward pass over packed groups, read by an estimator as it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import psutil
import torch
from torch import Tensor, nn

from cropi.artifacts import OK
from cropi.console import warn
from cropi.errors import PolicyError
from cropi.gradients.attention import own_attention, pack_rows, packed, unsupported
from cropi.gradients.capture import Capture, Idle, Reader, find_idle, watch_calls
from cropi.gradients.eligible import (
    ROUNDING,
    causal_lm_of,
    difference,
    embedded,
    leaks,
    reason,
    require_finite,
    vocabulary,
    without_effect,
)
from cropi.gradients.groups import Group
from cropi.gradients.head import Head, HeadResult, check_head
from cropi.gradients.packing import Pack, Segment, Span, make_pack, plan
from cropi.gradients.ratios import RatioMoments, moments
from cropi.gradients.sharded import Shards, Turn, forward_replaced
from cropi.gradients.surrogate import SurrogateSettings, trajectory_scales
from cropi.policy import longest_alike

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAST_ENOUGH = {"cpu": 2048, "cuda": 32768}
"""Tokens of a pack beyond which larger ones are no faster, so that memory decides only where it is short."""

STAGED_BYTES = {"cpu": 1 << 29, "cuda": 1 << 33}
"""Memory for what readers hold of the rows of a pack."""

Moments = list[tuple[int, RatioMoments]]


@dataclass
class Work:
    """What a run of the engine has done: tokens computed, and per result row the moments of its ratios."""

    tokens: int = 0
    ratios: dict[int, RatioMoments] = field(default_factory=dict)

    def add(self, tokens: int, moments: Moments) -> None:
        self.tokens += tokens
        for index, new in moments:
            self.ratios[index] = self.of(index) + new

    def of(self, index: int) -> RatioMoments:
        """The moments of one row; of no tokens where nothing was computed."""
        return self.ratios.get(index, RatioMoments())


def segment_of(
    index: int,
    group: Group,
    settings: SurrogateSettings,
    factors: Sequence[float] | None = None,
    mean_log_ratios: Sequence[float] | None = None,
) -> Segment | None:
    """What has to be computed of a group: its trajectories with a scale and a token. None where there is none.

    `factors` multiply the scales, one per trajectory: weights of a sub-sample, or a group's weight in a mean.
    """
    if group.status != OK:
        return None
    scales = trajectory_scales(group, settings, mean_log_ratios)
    if factors is not None:
        scales = [scale * factor for scale, factor in zip(scales, factors, strict=True)]
    kept = [k for k, scale in enumerate(scales) if scale != 0 and group.completions[k]]
    if not kept:
        return None
    logprobs = group.behaviour_logprobs
    return Segment(
        index,
        group.prompt_ids,
        [group.completions[k] for k in kept],
        [scales[k] for k in kept],
        None if logprobs is None else [logprobs[k] for k in kept],
    )


class Engine:
    """Runs groups through a transformers causal LM (bare, or with PEFT adapters) and lets a reader see the factors of
    their gradients.

    A forward pass costs F per token and the backward pass through activations another F: weights get no gradient. The
    model is left as it was found: mode, `requires_grad`, `.grad` and attention implementation. PolicyError where the
    architecture holds trainable weights that no hook covers, or does something with its logits or attention that the
    engine would not reproduce: it is compared once with the model's own forward pass.

    Parameters may be sharded (`fully_shard`, FSDP2). Every process then makes its own engine and runs its own groups
    inside `lockstep`.
    """

    def __init__(self, model: nn.Module, settings: SurrogateSettings, batch_tokens: int | None = None) -> None:
        self.model, self.settings = model, settings
        self._causal_lm: PreTrainedModel = causal_lm_of(model)
        self._longest = longest_alike(self._causal_lm)
        self._head = Head(self._causal_lm)
        self.shards = Shards(model)
        self.device = self.shards.device
        self._together = False
        with self._evaluating(), self._refusing():
            example = self._example()
            # Sharding is completed by the first forward pass, which has to find parameters as they are trained.
            with watch_calls(model) as called, torch.set_grad_enabled(not self.shards.sharded):
                theirs = self._own_logits(example)
            idle = Idle() if self.shards.sharded else find_idle(model, theirs, called)
            self._capture = Capture(model, self._causal_lm, self._head.module, self.shards, idle)
            if not self.parameters:
                raise without_effect(self._causal_lm)
            self._check_neighbours()
            bytes_per_token = self._check(example, torch.cat(theirs).detach())
            self._check_gradients()
            self.repeated = self._capture.repeated()
        self.budget = batch_tokens or self.shards.least(_budget(self.device, bytes_per_token))

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All trainable parameters that a text reaches, by name; a tied weight is counted once, under its first name.
        Of sharded ones, tensors of the whole shape that take no memory."""
        return self._capture.trainable

    @property
    def matrices(self) -> set[str]:
        """Names of the parameters that are the weight of a linear layer."""
        return self._capture.matrices

    @property
    def vocabulary(self) -> set[str]:
        """Names of those matrices whose rows are tokens: the head's, tied or not."""
        return set(self._capture.head_names.values())

    def run(
        self,
        segments: Sequence[Segment],
        reader: Reader,
        *,
        after: Callable[[Sequence[Segment]], None] | None = None,
        divisible: bool = True,
    ) -> Work:
        """Pass segments through the model, in packs of similar length; `after` is told of each finished pack.

        A prompt that exceeds the token budget is split among its trajectories, unless the reader needs it whole
        (`divisible=False`). Running out of memory halves the budget.
        """
        work = Work()
        most = max(1, STAGED_BYTES.get(self.device.type, 1 << 29) // reader.row_bytes) if reader.row_bytes else None
        waiting = self._plan(segments, divisible, most)
        with self.lockstep(), self._evaluating():
            while waiting:
                members = waiting[0]
                self._await_turn(Turn.BACKWARD)
                try:
                    reader.begin(members)
                    tokens, moments = self._pass(members, reader)
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    if not _out_of_memory(error):
                        raise
                    if not self._divides(members, divisible):
                        raise _indivisible(members[0], self.device) from error
                    if self.shards.sharded:  # the others are in the middle of this pass, which cannot be had again
                        raise _too_large(self.budget) from error
                else:
                    reader.commit()
                    work.add(tokens, moments)
                    waiting.pop(0)
                    if after is not None:
                        after(members)
                    continue
                # Outside the handler, so that the error's traceback no longer holds the pack's tensors.
                if reader.undo():
                    left = [segment for pack in waiting for segment in pack]
                else:
                    left, work.ratios = list(segments), {}
                self.budget = max(1, sum(segment.tokens for segment in members) // 2)
                warn(f"out of memory while scoring; packs now hold {self.budget} tokens")
                waiting = self._plan(left, divisible, most)
        return work

    def logprobs(self, segments: Sequence[Segment]) -> Work:
        """A forward pass alone, for the ratios."""
        work = Work()
        with self.lockstep(), self._evaluating():
            for members in self._plan(segments, divisible=True):
                self._await_turn(Turn.FORWARD)
                work.add(*self._look(members))
        return work

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """Run groups inside as often as need be, whatever other processes do with theirs: a process that leaves goes on
        taking part in the passes of those that have not. Nothing happens where parameters are not sharded.

        Every process has to enter the same blocks in the same order. `run` and `logprobs` are such a block by
        themselves, outside of another.
        """
        if self._together or self.shards.count == 1:
            yield
            return
        self._together = True
        try:
            yield
            with self._evaluating():
                self._await_turn(Turn.NOTHING)
        finally:
            self._together = False

    @property
    def in_lockstep(self) -> bool:
        """Whether other processes may be doing something else than this one."""
        return self._together

    def _await_turn(self, turn: Turn) -> None:
        """Take part in what the other processes do, until all do what this one wants to."""
        while (agreed := self.shards.agree(turn)) != turn:
            members = [Segment(0, [0], [[0, 0]], [0.0], None)]
            if agreed == Turn.BACKWARD:
                self._pass(members, Nothing())
            else:
                self._look(members)

    def _plan(self, segments: Sequence[Segment], divisible: bool, most: int | None = None) -> list[list[Segment]]:
        parts = list(segments)
        longest = 1 + max((segment.longest for segment in parts), default=0)
        if longest > self._longest:
            raise _changes_with_length(self._causal_lm, self._longest, longest)
        if divisible:
            parts = [part for segment in segments for part in _divided(segment, self.budget)]
        return plan(parts, self.budget, most)

    @staticmethod
    def _divides(members: Sequence[Segment], divisible: bool) -> bool:
        return len(members) > 1 or (divisible and len(members[0].completions) > 1)

    def _pass(self, members: Sequence[Segment], reader: Reader) -> tuple[int, Moments]:
        pack = make_pack(members, self.device)
        found: list[HeadResult] = []

        def at_head(hidden_SH: Tensor) -> Tensor:
            found.append(self._head(hidden_SH, pack, self.settings, reader, self._capture.head_names))
            return found[0].grad_SH

        with self._capture.hooks(reader, pack.spans, pack.tokens), pack_rows(self._causal_lm, pack.rows):
            self._forward(pack, at_head).backward()
        return pack.tokens, _moments(pack, found[0].log_ratios_E, self.settings.clip)

    @torch.no_grad()
    def _look(self, members: Sequence[Segment]) -> tuple[int, Moments]:
        """A forward pass alone."""
        pack = make_pack(members, self.device)
        found: list[HeadResult] = []

        def at_head(hidden_SH: Tensor) -> Tensor:
            found.append(self._head(hidden_SH, pack, self.settings, None, {}))
            return found[0].grad_SH

        with pack_rows(self._causal_lm, pack.rows):
            self._forward(pack, at_head)
        self.shards.release()
        return pack.tokens, _moments(pack, found[0].log_ratios_E, self.settings.clip)

    def _forward(self, pack: Pack, at_head: Callable[[Tensor], Tensor]) -> Tensor:
        """A pack up to the head: `at_head` is given its hidden states and gives their gradient, with which a backward
        pass from the result begins.

        The model and its head are entered as modules, though something else than their own logits is made there: by
        these calls sharded parameters are gathered, and a backward pass from the result gathers them again.
        """

        def head(hidden_1SH: Tensor) -> Tensor:
            return _GivenGradient.apply(hidden_1SH, at_head(hidden_1SH[0].detach())[None])

        def forward(input_ids: Tensor, position_ids: Tensor) -> Tensor:
            output = self._causal_lm.base_model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, return_dict=True
            )
            return self._head.module(output.last_hidden_state)

        with forward_replaced(self.model, forward), forward_replaced(self._head.module, head):
            return self.model(input_ids=pack.input_ids_S[None], position_ids=pack.position_ids_S[None])

    def _own_forward(self) -> AbstractContextManager[None]:
        """The model's forward pass as its class has it: trainers wrap that of an object in autocast."""
        return forward_replaced(self.model, partial(type(self.model).forward, self.model))

    def _own_logits(self, segment: Segment) -> list[Tensor]:
        """What the model itself predicts a segment's completions by."""
        found = []
        with own_attention(self._causal_lm), self._own_forward(), self._head.watched() as seen:
            for completion in segment.completions:
                ids = torch.tensor([segment.prompt_ids + completion[:-1]], device=self.device)
                found.append(self.model(input_ids=ids, use_cache=False).logits[0])
        self.shards.release()
        self._head.fit(seen, found)
        return [logits[len(segment.prompt_ids) - 1 :] for logits in found]

    def _example(self) -> Segment:
        """Random tokens, of several lengths."""
        rows = self._causal_lm.get_input_embeddings().num_embeddings
        generator = torch.Generator().manual_seed(0)

        def draw(count: int) -> list[int]:
            count = max(1, int(count * min(1, self._longest / 40)))
            return torch.randint(rows, (count,), generator=generator).tolist()

        return Segment(0, draw(23), [draw(17), draw(1), draw(12)], [1.0] * 3, None)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with packed(self._causal_lm), torch.autocast(self.device.type, enabled=False), torch.enable_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Turn whatever a model's own code raises inside the block into a refusal."""
        try:
            yield
        except PolicyError:
            raise
        except Exception as error:
            if _out_of_memory(error):
                raise
            why = f"its forward pass does not take a pack of trajectories ({reason(error)})"
            raise unsupported(self._causal_lm, why) from error

    def _drawn(self) -> list[Segment]:
        """A few trajectories, shorter than any length that rotary positions depend on; their count of tokens, 43, is no
        other size in a model."""
        draw = partial(torch.randint, vocabulary(self._causal_lm), generator=torch.Generator().manual_seed(0))
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

    def _check_neighbours(self) -> None:
        """PolicyError where a token's hidden state depends on more than its own trajectory up to it: the gradient must
        be exactly 0 elsewhere in the pack, which no rounding blurs; and another order of the same trajectories must
        change nothing."""
        members, hidden = self._drawn(), list[Tensor]()
        for order in (members[::-1], members):
            pack, start = make_pack(order, self.device), order[0].tokens
            own = [*range(start, start + 5), start + 5 + 6]  # the prompt and the first token of its last completion

            def at_head(hidden_SH: Tensor, start: int = start, last: int = own[-1]) -> Tensor:
                require_finite(hidden_SH)
                hidden.append(hidden_SH[start : start + members[1].tokens])
                gradient_SH = torch.zeros_like(hidden_SH)
                gradient_SH[last] = hidden_SH[last]
                return gradient_SH

            others_1S = torch.ones(1, pack.tokens, dtype=torch.bool, device=self.device)
            others_1S[0, own] = False
            if leaks([tensor.grad for tensor in self._embedded(pack, at_head).values()], others_1S):
                why = "beside attention its tokens see others (a state-space, recurrent or convolutional layer)"
                raise unsupported(self._causal_lm, why)
        if difference(hidden[0], hidden[1]) > 0.1 * ROUNDING.get(hidden[0].dtype, 5e-3):
            raise unsupported(self._causal_lm, "its tokens depend on their place in a pack (it ignores position_ids)")

    def _check_gradients(self) -> None:
        """PolicyError where the surrogate's gradient at a pack's tokens is not what the model's own passes give, one
        trajectory at a time."""
        members, first = self._drawn(), self._causal_lm.get_input_embeddings()
        pack = make_pack(members, self.device)
        ours = self._embedded(
            pack, lambda hidden_SH: self._head(hidden_SH, pack, self.settings, Nothing(), {}).grad_SH
        )[first].grad
        assert ours is not None
        theirs, start = torch.zeros_like(ours), 0
        for member in members:
            begin, count = start + len(member.prompt_ids), len(member.prompt_ids)
            for completion, scale in zip(member.completions, member.scales, strict=True):
                places = [*range(start, start + count), *range(begin, begin + len(completion) - 1)]
                theirs[0, places] += scale * self._own_gradient(member.prompt_ids, completion)
                begin += len(completion) - 1
            start = begin
        self.shards.release()
        gap = difference(ours[0], theirs[0])
        if gap > 4 * ROUNDING.get(ours.dtype, 5e-3):
            raise unsupported(
                self._causal_lm, f"its own gradients differ from the engine's by {gap:.1%} on a test pack"
            )

    def _embedded(self, pack: Pack, at_head: Callable[[Tensor], Tensor]) -> dict[nn.Module, Tensor]:
        """What embeddings give in a pack, with its gradients."""
        with (
            self._capture.hooks(Nothing(), pack.spans, pack.tokens),
            pack_rows(self._causal_lm, pack.rows),
            embedded(self._causal_lm) as found,
        ):
            self._forward(pack, at_head).backward()
        return found

    def _own_gradient(self, prompt_ids: list[int], completion: list[int]) -> Tensor:
        """Of a trajectory's log-probability at its embedded tokens (all but the last), by the model's own pass."""
        ids_1T = torch.tensor([prompt_ids + completion], device=self.device)
        with (
            own_attention(self._causal_lm),
            self._own_forward(),
            self._capture.frozen(),
            embedded(self._causal_lm) as found,
        ):
            logits_TW = self.model(input_ids=ids_1T[:, :-1], use_cache=False).logits[0, len(prompt_ids) - 1 :]
            logits_TW = logits_TW.to(torch.promote_types(logits_TW.dtype, torch.float32)) / self.settings.temperature
            logits_TW.log_softmax(dim=-1).gather(1, ids_1T[0, len(prompt_ids) :, None]).sum().backward()
        gradient = found[self._causal_lm.get_input_embeddings()].grad
        assert gradient is not None
        return gradient[0]

    def _check(self, segment: Segment, theirs_EW: Tensor) -> float:
        """Compare a small pack with the model's own logits. Returns bytes of activations kept per token."""
        pack, kept = make_pack([segment], self.device), _Kept(self.model)
        ours: list[tuple[Tensor, torch.dtype]] = []

        def at_head(hidden_SH: Tensor) -> Tensor:
            ours.append((self._head.logits(hidden_SH.index_select(0, pack.sources_E)), hidden_SH.dtype))
            return torch.zeros_like(hidden_SH)

        with (
            kept,
            self._capture.hooks(Nothing(), pack.spans, pack.tokens),
            pack_rows(self._causal_lm, pack.rows),
        ):
            self._forward(pack, at_head).backward()
        self.shards.release()
        check_head(self._causal_lm, ours[0][0], theirs_EW, ours[0][1])
        return kept.bytes / pack.tokens


class Nothing:
    """A reader that reads nothing: the floor of the engine's cost."""

    row_bytes = 0

    def begin(self, segments: Sequence[Segment]) -> None: ...
    def linear(self, name: str, inputs_TI: Tensor, grads_TO: Tensor, spans: Sequence[Span]) -> None: ...
    def rows(self, name: str, ids_T: Tensor, grads_TI: Tensor, spans: Sequence[Span]) -> None: ...
    def vector(self, name: str, grads_TP: Tensor, spans: Sequence[Span]) -> None: ...
    def commit(self) -> None: ...
    def undo(self) -> bool:
        return True


class _GivenGradient(torch.autograd.Function):
    """A number of no meaning, from which a backward pass gives hidden states the gradient that is known already."""

    @staticmethod
    def forward(ctx: Any, hidden_1SH: Tensor, grad_1SH: Tensor) -> Tensor:
        ctx.grad_1SH = grad_1SH
        return hidden_1SH.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.grad_1SH, None


def _plain(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return type(tensor) in {Tensor, nn.Parameter}


class _Kept:
    """Counts the bytes of activations that a pass inside keeps for its backward pass; weights are kept anyway.

    Activations are plain tensors; one of another class is a quantised weight, whose storage cannot be asked for.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._weights = model, set[int]()
        self._found: dict[int, int] = {}

    def __enter__(self) -> None:
        self._stack = ExitStack()
        for module in self._model.modules():
            if module._parameters:
                # Whole parameters of a sharded module exist only during its call.
                self._stack.callback(module.register_forward_pre_hook(self._note_weights).remove)
        self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor))

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _note_weights(self, module: nn.Module, args: Any) -> None:
        self._weights = {p.untyped_storage().data_ptr() for p in module._parameters.values() if _plain(p)}

    def _note(self, tensor: Tensor) -> Tensor:
        if _plain(tensor) and tensor.untyped_storage().data_ptr() not in self._weights:
            self._found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._found.values())


def _changes_with_length(model: PreTrainedModel, bound: float, longest: int) -> PolicyError:
    return PolicyError(
        f"the rotary positions of {type(model).__name__} change for sequences of more than {bound:.0f} tokens, and a "
        f"prompt with its completion has {longest}: it cannot be scored beside shorter ones",
        where="policy",
        fix="leave out long prompts, or sample shorter completions.",
    )


def _too_large(budget: int) -> PolicyError:
    return PolicyError(
        f"out of memory while scoring with sharded parameters, in packs of {budget} tokens",
        where="score.batch_tokens",
        fix=f"set it to {max(1, budget // 2)} or less: a pass that all processes share cannot be repeated by one.",
    )


def _indivisible(segment: Segment, device: torch.device) -> PolicyError:
    count = len(segment.completions)
    what = "one trajectory" if count == 1 else f"{count} trajectories of one prompt, which are needed together"
    return PolicyError(
        f"out of memory while scoring {what} ({segment.tokens} tokens), with {free_bytes(device) / 2**30:.2f} GiB free",
        where=f"device {device}",
        fix="free memory of other processes there, or score fewer or shorter trajectories "
        "(collect.num_generations, collect.max_completion_length); what is finished is kept.",
    )


def _budget(device: torch.device, bytes_per_token: float) -> int:
    """The largest pack that half of the free memory holds, up to where packs stop getting faster."""
    return int(max(256, min(FAST_ENOUGH.get(device.type, 2048), free_bytes(device) / 2 / bytes_per_token)))


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors can have, what torch keeps for that included."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def by_group(advance: Callable[[int], None] | None) -> Callable[[Sequence[Segment]], None] | None:
    """Count the groups of a pack."""
    return None if advance is None else lambda members: advance(len({segment.index for segment in members}))


def _divided(segment: Segment, budget: int) -> list[Segment]:
    """The segment, or parts of it with some of its completions each, none above the budget if that can be."""
    if segment.tokens <= budget or len(segment.completions) == 1:
        return [segment]
    return [part for half in segment.halves() for part in _divided(half, budget)]


def _moments(pack: Pack, log_ratios_E: Tensor, clip: float) -> Moments:
    """Per row: sums over its tokens."""
    return list(zip([s.index for s in pack.predictions], moments(log_ratios_E, pack.predictions, clip), strict=True))


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in text
