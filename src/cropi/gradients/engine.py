"""The engine: one forward pass and one activation backward pass over packed groups, observed by a reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn

from cropi.artifacts import OK
from cropi.console import warn
from cropi.errors import PolicyError, first_line
from cropi.fsdp import ShardedParameters, Turn, forward_replaced
from cropi.gradients.attention import pack_rows, packed, unsupported
from cropi.gradients.capture import Capture, FactorReader, Idle, find_idle, watch_calls
from cropi.gradients.groups import Group, RatioStatistics, SurrogateSettings, ratio_statistics, trajectory_scales
from cropi.gradients.head import Head
from cropi.gradients.model_checks import (
    causal_lm_of,
    check_gradients,
    check_logits,
    check_neighbours,
    example_segment,
    models_own_logits,
    without_effect,
)
from cropi.gradients.packing import Pack, Segment, make_pack, plan
from cropi.policy import evaluating, is_out_of_memory, longest_alike

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAST_ENOUGH = {"cpu": 2048, "cuda": 32768}
"""Tokens of a pack beyond which larger packs are no faster. Memory decides only below that."""

STAGED_BYTES = {"cpu": 1 << 29, "cuda": 1 << 33}  # memory that readers may use for the rows of a pack

Statistics = list[tuple[int, RatioStatistics]]


@dataclass
class Work:
    """Work done by a run of the engine: tokens computed, and ratio statistics by result row."""

    tokens: int = 0
    ratios: dict[int, RatioStatistics] = field(default_factory=dict)

    def add(self, tokens: int, statistics: Statistics) -> None:
        self.tokens += tokens
        for index, new in statistics:
            self.ratios[index] = self.of(index) + new

    def of(self, index: int) -> RatioStatistics:
        """Return the statistics of one row; those of no tokens if nothing was computed."""
        return self.ratios.get(index, RatioStatistics())


def segment_of(
    index: int, group: Group, settings: SurrogateSettings, factors: Sequence[float] | None = None
) -> Segment | None:
    """Make the segment of a group: its trajectories with a non-zero scale and at least one token; None without any.

    `factors` multiply the scales, one per trajectory: a half of the group, or the group's weight in a mean.
    """
    if group.status != OK:
        return None
    scales = trajectory_scales(group, settings)
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


def segments_of(
    groups: Sequence[Group], settings: SurrogateSettings, factors: Sequence[Sequence[float]] | None = None
) -> list[Segment]:
    """Make the segments of groups that have any; a group's place is its result row. For `factors` see `segment_of`."""
    found = [
        segment_of(index, group, settings, None if factors is None else factors[index])
        for index, group in enumerate(groups)
    ]
    return [segment for segment in found if segment is not None]


class Engine:
    """Run groups through a transformers causal LM (bare, or with PEFT adapters) and pass the factors of their gradients
    to a reader.

    A forward pass costs F per token, and the backward pass through activations another F: no weight gradient is formed.
    The model's mode, `requires_grad`, `.grad` and attention implementation are left unchanged. Raises PolicyError if
    trainable weights are not covered by a hook, or if the engine cannot reproduce the model's logits or attention. To
    find out, it is compared once with the model's own forward and backward pass.

    Parameters may be sharded (`fully_shard`, FSDP2). Every process then makes its own engine and runs its own groups
    inside `lockstep`.
    """

    def __init__(self, model: nn.Module, settings: SurrogateSettings, batch_tokens: int | None = None) -> None:
        self.model, self.settings = model, settings
        self.causal_lm: PreTrainedModel = causal_lm_of(model)
        self._longest = longest_alike(self.causal_lm)
        self.head = Head(self.causal_lm)
        self.shards = ShardedParameters(model)
        self.device = self.shards.device
        self._together = False
        with self._evaluating(), self._refusing():
            example = example_segment(self.causal_lm, self._longest)
            # The first forward pass completes the sharding, and needs parameters in the state they are trained in.
            with watch_calls(model) as called, torch.set_grad_enabled(not self.shards.sharded):
                theirs = models_own_logits(self, example)
            idle = Idle() if self.shards.sharded else find_idle(model, theirs, called)
            self.capture = Capture(model, self.causal_lm, self.head.module, self.shards, idle)
            if not self.parameters:
                raise without_effect(self.causal_lm)
            check_neighbours(self)
            bytes_per_token = check_logits(self, example, torch.cat(theirs).detach())
            check_gradients(self)
            self.repeated = self.capture.repeated()
        self.budget = batch_tokens or self.shards.least(_budget(self.device, bytes_per_token))

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Trainable parameters that text input uses, by name; a tied weight is counted once, under its first name.
        Sharded ones are represented by tensors of the full shape that take no memory."""
        return self.capture.trainable

    @property
    def matrices(self) -> set[str]:
        """Names of the weights of linear layers."""
        return self.capture.matrices

    @property
    def vocabulary(self) -> set[str]:
        """Names of the matrices whose rows are tokens: the head's weight, tied or not."""
        return set(self.capture.head_names.values())

    def run(
        self,
        segments: Sequence[Segment],
        reader: FactorReader,
        *,
        after: Callable[[Sequence[Segment]], None] | None = None,
        divisible: bool = True,
    ) -> Work:
        """Pass segments through the model, in packs of similar length; `after` is called with each finished pack.

        A prompt above the token budget is split by trajectories, unless the reader needs it whole (`divisible=False`).
        Running out of memory halves the budget.
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
                    tokens, statistics = self._pass(members, reader)
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    if not self._divides(members, divisible):
                        raise _indivisible(members[0], self.device) from error
                    if self.shards.sharded:  # the other processes are inside this pass, which cannot be repeated
                        raise _too_large(self.budget) from error
                else:
                    reader.commit()
                    work.add(tokens, statistics)
                    waiting.pop(0)
                    if after is not None:
                        after(members)
                    continue
                # Outside the handler, because the error's traceback holds the pack's tensors.
                if reader.undo():
                    left = [segment for pack in waiting for segment in pack]
                else:
                    left, work.ratios = list(segments), {}
                self.budget = max(1, sum(segment.tokens for segment in members) // 2)
                warn(f"out of memory while scoring; packs now hold {self.budget} tokens")
                waiting = self._plan(left, divisible, most)
        return work

    def forward_only(self, segments: Sequence[Segment]) -> Work:
        """Run the forward pass alone, for ratio statistics and to measure its cost."""
        work = Work()
        with self.lockstep(), self._evaluating():
            for members in self._plan(segments, divisible=True):
                self._await_turn(Turn.FORWARD)
                work.add(*self._pass(members, None))
        return work

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """Let each process run any number of groups inside the block: a process that leaves keeps taking part in the
        passes of the others. Does nothing if parameters are not sharded.

        Every process must enter the same blocks in the same order. `run` and `forward_only` outside a block open one of
        their own.
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
        """Whether the process is inside `lockstep`, where other processes may do something else."""
        return self._together

    def _await_turn(self, turn: Turn) -> None:
        """Join the passes of the other processes until all agree on `turn`."""
        while (agreed := self.shards.agree(turn)) != turn:
            members = [Segment(0, [0], [[0, 0]], [0.0], None)]
            self._pass(members, FactorReader() if agreed == Turn.BACKWARD else None)

    def _plan(self, segments: Sequence[Segment], divisible: bool, most: int | None = None) -> list[list[Segment]]:
        parts = list(segments)
        longest = 1 + max((segment.longest for segment in parts), default=0)
        if longest > self._longest:
            raise _changes_with_length(self.causal_lm, self._longest, longest)
        if divisible:
            parts = [part for segment in segments for part in _divided(segment, self.budget)]
        return plan(parts, self.budget, most)

    @staticmethod
    def _divides(members: Sequence[Segment], divisible: bool) -> bool:
        return len(members) > 1 or (divisible and len(members[0].completions) > 1)

    def _pass(self, members: Sequence[Segment], reader: FactorReader | None) -> tuple[int, Statistics]:
        """Run a pack forward and backward; without a reader forward alone."""
        pack = make_pack(members, self.device)
        found: list[Tensor] = []

        def at_head(hidden_SH: Tensor) -> Tensor:
            log_ratios_E, grad_SH = self.head(hidden_SH, pack, self.settings, reader, self.capture.head_names)
            found.append(log_ratios_E)
            return grad_SH

        with pack_rows(self.causal_lm, pack.rows):
            if reader is None:
                with torch.no_grad():
                    self.forward(pack, at_head)
                self.shards.release()
            else:
                with self.capture.hooks(reader, pack.spans, pack.tokens):
                    self.forward(pack, at_head).backward()
        sums = ratio_statistics(found[0], pack.predictions)
        return pack.tokens, [(span.index, one) for span, one in zip(pack.predictions, sums, strict=True)]

    def forward(self, pack: Pack, at_head: Callable[[Tensor], Tensor]) -> Tensor:
        """Run a pack up to the head. `at_head` maps its hidden states to their gradient, with which the backward pass
        from the result begins.

        The model and its head are still called as modules, with their forward replaced, because these calls gather
        sharded parameters; the backward pass gathers them again.
        """

        def head(hidden_1SH: Tensor) -> Tensor:
            return _InjectGradient.apply(hidden_1SH, at_head(hidden_1SH[0].detach())[None])

        def forward(input_ids: Tensor, position_ids: Tensor) -> Tensor:
            output = self.causal_lm.base_model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, return_dict=True
            )
            return self.head.module(output.last_hidden_state)

        with forward_replaced(self.model, forward), forward_replaced(self.head.module, head):
            return self.model(input_ids=pack.input_ids_S[None], position_ids=pack.position_ids_S[None])

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        plain = torch.autocast(self.device.type, enabled=False)
        with evaluating(self.model), packed(self.causal_lm), plain, torch.enable_grad():
            yield

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Turn any error that a model's own code raises inside the block into a PolicyError."""
        try:
            yield
        except PolicyError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            why = f"its forward pass does not take a pack of trajectories ({type(error).__name__}: {first_line(error)})"
            raise unsupported(self.causal_lm, why) from error


class _InjectGradient(torch.autograd.Function):
    """A dummy scalar whose backward pass injects a precomputed gradient."""

    @staticmethod
    def forward(ctx: Any, hidden_1SH: Tensor, grad_1SH: Tensor) -> Tensor:
        ctx.grad_1SH = grad_1SH
        return hidden_1SH.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.grad_1SH, None


def _changes_with_length(model: PreTrainedModel, bound: float, longest: int) -> PolicyError:
    return PolicyError(
        f"{type(model).__name__} changes its rotary positions above {bound:.0f} tokens, and a prompt with its "
        f"completion has {longest}: it cannot be scored together with shorter ones",
        where="policy",
        fix="leave out long prompts, or sample shorter completions.",
    )


def _too_large(budget: int) -> PolicyError:
    return PolicyError(
        f"out of memory while scoring with sharded parameters, in packs of {budget} tokens",
        where="score.batch_tokens",
        fix=f"set it to {max(1, budget // 2)} or less; one process cannot repeat a pass that all share.",
    )


def _indivisible(segment: Segment, device: torch.device) -> PolicyError:
    count = len(segment.completions)
    what = "one trajectory" if count == 1 else f"{count} trajectories of one prompt, which cannot be divided"
    return PolicyError(
        f"out of memory while scoring {what} ({segment.tokens} tokens), with {free_bytes(device) / 2**30:.2f} GiB free",
        where=f"device {device}",
        fix="free memory of other processes there, or score fewer or shorter trajectories "
        "(collect.num_generations, collect.max_completion_length); finished work is kept.",
    )


def _budget(device: torch.device, bytes_per_token: float) -> int:
    """Return the largest pack that fits into half of the free memory, at most `FAST_ENOUGH` tokens."""
    return int(max(256, min(FAST_ENOUGH.get(device.type, 2048), free_bytes(device) / 2 / bytes_per_token)))


def free_bytes(device: torch.device) -> int:
    """Return the memory available to new tensors, including what torch has reserved."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def by_group(advance: Callable[[int], None] | None) -> Callable[[Sequence[Segment]], None] | None:
    """Report the number of groups of each finished pack."""
    return None if advance is None else lambda members: advance(len({segment.index for segment in members}))


def _divided(segment: Segment, budget: int) -> list[Segment]:
    """Divide a segment by completions until no part exceeds the budget, as far as possible."""
    if segment.tokens <= budget or len(segment.completions) == 1:
        return [segment]
    return [part for half in segment.halves() for part in _divided(half, budget)]
