"""Packing of groups into one row of tokens, without padding, with each prompt once for all of its trajectories.

A *segment* is a prompt with the trajectories that share it: first the prompt, then the completions one after another,
each without its last token, which predicts nothing. A completion's tokens have the positions right after the prompt,
and attention (see `attention.py`) lets them see the prompt and their own completion only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ROOM, FEW = 0.85, 16
"""A row joins a block of attention rows if it fills at least this share of the width, or leaves at most `FEW` tokens
empty: then padding costs less than another call."""


@dataclass(frozen=True)
class Segment:
    """A prompt, its completions, and the factor A_k / Z_k of each.

    `index` is the result row of the segment's gradient.
    """

    index: int
    prompt_ids: list[int]
    completions: list[list[int]]
    scales: list[float]
    behaviour_logprobs: list[list[float]] | None
    repeats_prompt: bool = False  # true for all but one segment of a divided group, so that its prompt is counted once

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.prompt_ids) + sum(len(completion) - 1 for completion in self.completions)

    @property
    def longest(self) -> int:
        """Tokens of the longest attention row: the prompt and one completion."""
        return len(self.prompt_ids) + max(len(completion) for completion in self.completions) - 1

    def alone(self) -> list[Segment]:
        """Split into one segment per trajectory, each with its own copy of the prompt."""
        return [self._part(slice(k, k + 1)) for k in range(len(self.completions))]

    def halves(self) -> list[Segment]:
        """Split into two segments with half of the completions each. Their gradients add up."""
        middle = len(self.completions) // 2
        return [self._part(slice(0, middle)), self._part(slice(middle, None))]

    def _part(self, part: slice) -> Segment:
        logprobs = self.behaviour_logprobs
        return Segment(
            self.index,
            self.prompt_ids,
            self.completions[part],
            self.scales[part],
            None if logprobs is None else logprobs[part],
            self.repeats_prompt or part.start > 0,
        )


@dataclass(frozen=True)
class Span:
    """A stretch [start, stop) of tokens, and its result row."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Rows:
    """The arrangement of packed tokens in attention rows: prompt + one completion, padded on the right.

    Rows of similar length make a block, which limits padding. Padding repeats the row's first token: under a causal
    mask no other token sees it. R counts the tokens of all rows, with padding.
    """

    blocks: list[tuple[int, int]]  # (rows, width) of each block, in the order of their tokens
    gather_R: Tensor  # pack position of each token of each row
    scatter_S: Tensor  # row position of each packed token's result; that of a prompt token is in its first row
    prompt_tokens_Q: Tensor  # pack positions of prompt tokens shared by several rows, those with most rows first
    copies: list[Tensor]
    """Row positions of the second, third, ... copies of those tokens; each list covers a prefix of the one before."""


@dataclass(frozen=True)
class Pack:
    """Segments ready for one forward and backward pass. S tokens, E predictions."""

    input_ids_S: Tensor
    position_ids_S: Tensor
    spans: list[Span]
    rows: Rows
    sources_E: Tensor  # pack position of the hidden state that predicts each completion token
    targets_E: Tensor
    scales_E: Tensor  # A_k / Z_k of the trajectory of each prediction, float64
    behaviour_E: Tensor | None  # log beta of each target; None if all are on-policy
    on_policy_E: Tensor  # true if the segment has no behaviour log-probs, so that the ratio is 1
    predictions: list[Span]  # stretches of the E predictions, with the result row of each

    @cached_property
    def tokens(self) -> int:
        return len(self.input_ids_S)


def plan(segments: Sequence[Segment], budget: int, most: int | None = None) -> list[list[Segment]]:
    """Divide segments, longest first, into packs of at most `budget` tokens and `most` segments; a larger segment gets
    a pack of its own.

    Similar lengths in a pack reduce attention's padding. The plan depends only on the arguments.
    """
    order = sorted(segments, key=lambda s: (-s.longest, -s.tokens, s.index))
    packs: list[list[Segment]] = []
    room = 0
    for segment in order:
        if segment.tokens > room or (most is not None and len(packs[-1]) >= most):
            packs.append([])
            room = budget
        packs[-1].append(segment)
        room -= segment.tokens
    return packs


def make_pack(segments: Sequence[Segment], device: torch.device) -> Pack:
    """Make the tensors of a pack."""
    ids: list[int] = []
    positions: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    scales: list[float] = []
    behaviour: list[float] = []
    on_policy: list[bool] = []
    spans: list[Span] = []
    predictions: list[Span] = []
    for segment in segments:
        start, first_prediction, length = len(ids), len(targets), len(segment.prompt_ids)
        ids += segment.prompt_ids
        positions += range(length)
        for k, completion in enumerate(segment.completions):
            sources += [start + length - 1, *range(len(ids), len(ids) + len(completion) - 1)]
            ids += completion[:-1]
            positions += range(length, length + len(completion) - 1)
            targets += completion
            scales += [segment.scales[k]] * len(completion)
            logprobs = segment.behaviour_logprobs
            behaviour += [0.0] * len(completion) if logprobs is None else logprobs[k]
            on_policy += [logprobs is None] * len(completion)
        spans.append(Span(segment.index, start, len(ids)))
        predictions.append(Span(segment.index, first_prediction, len(targets)))
    return Pack(
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        spans,
        _rows(segments, spans, device),
        torch.tensor(sources, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(scales, dtype=torch.float64, device=device),
        torch.tensor(behaviour, dtype=torch.float64, device=device) if not all(on_policy) else None,
        torch.tensor(on_policy, device=device),
        predictions,
    )


def _rows(segments: Sequence[Segment], spans: Sequence[Span], device: torch.device) -> Rows:
    rows: list[tuple[int, int, range, range]] = []  # (segment, which of its rows, prompt, completion)
    for number, (segment, span) in enumerate(zip(segments, spans, strict=True)):
        prompt = range(span.start, span.start + len(segment.prompt_ids))
        begin = prompt.stop
        for k, completion in enumerate(segment.completions):
            rows.append((number, k, prompt, range(begin, begin + len(completion) - 1)))
            begin += len(completion) - 1
    rows.sort(key=lambda row: -(len(row[2]) + len(row[3])))
    blocks: list[tuple[int, int]] = []
    gather: list[int] = []
    scatter = [0] * spans[-1].stop
    starts: dict[tuple[int, int], int] = {}  # first token of each (segment, row)
    for number, k, prompt, completion_tokens in rows:
        length = len(prompt) + len(completion_tokens)
        if not blocks or length < min(ROOM * blocks[-1][1], blocks[-1][1] - FEW):
            blocks.append((0, length))
        count, width = blocks[-1]
        blocks[-1] = (count + 1, width)
        starts[number, k] = start = len(gather)
        gather += [*prompt, *completion_tokens, *[prompt[0]] * (width - length)]
        scatter[completion_tokens.start : completion_tokens.stop] = range(start + len(prompt), start + length)
        if k == 0:
            scatter[prompt.start : prompt.stop] = range(start, start + len(prompt))
    shared = sorted(
        (number for number, segment in enumerate(segments) if len(segment.completions) > 1),
        key=lambda number: -len(segments[number].completions),
    )
    shared_tokens: list[int] = []
    copies: list[list[int]] = []
    for number in shared:
        length = len(segments[number].prompt_ids)
        shared_tokens += range(spans[number].start, spans[number].start + length)
        for k in range(1, len(segments[number].completions)):
            if len(copies) < k:
                copies.append([])
            copies[k - 1] += range(starts[number, k], starts[number, k] + length)
    return Rows(
        blocks,
        torch.tensor(gather, device=device),
        torch.tensor(scatter, device=device),
        torch.tensor(shared_tokens, dtype=torch.int64, device=device),
        [torch.tensor(places, device=device) for places in copies],
    )
