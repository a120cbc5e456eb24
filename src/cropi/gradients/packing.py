"""Groups side by side in one row of tokens: no padding, and each prompt once for all of its trajectories.

A *segment* is a prompt with the trajectories that share it. Its tokens stand together: first the prompt, then the
completions one after another, each without its last token, which predicts nothing. A completion's tokens carry the
positions they would have right after the prompt, and attention (see `attention.py`) lets them see the prompt and their
own completion only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A prompt, the completions to be computed after it, and the factor A_k / Z_k of each.

    `index` is the row of the results that the segment's gradient belongs to.
    """

    index: int
    prompt_ids: list[int]
    completions: list[list[int]]
    scales: list[float]
    behaviour_logprobs: list[list[float]] | None

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.prompt_ids) + sum(len(completion) - 1 for completion in self.completions)

    @property
    def longest(self) -> int:
        """Tokens of the longest row of attention: the prompt and one completion."""
        return len(self.prompt_ids) + max(len(completion) for completion in self.completions) - 1

    def alone(self) -> list[Segment]:
        """One segment for each trajectory, each with a prompt of its own."""
        logprobs = self.behaviour_logprobs
        return [
            Segment(self.index, self.prompt_ids, [completion], [scale], None if logprobs is None else [logprobs[k]])
            for k, (completion, scale) in enumerate(zip(self.completions, self.scales, strict=True))
        ]

    def halves(self) -> list[Segment]:
        """Two segments with half of the completions each. Gradients add up."""
        middle = len(self.completions) // 2
        logprobs = self.behaviour_logprobs
        return [
            Segment(
                self.index,
                self.prompt_ids,
                self.completions[part],
                self.scales[part],
                None if logprobs is None else logprobs[part],
            )
            for part in (slice(0, middle), slice(middle, None))
        ]


@dataclass(frozen=True)
class Span:
    """Which result row a stretch [start, stop) of tokens belongs to."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Rows:
    """How packed tokens stand in the rows of attention: row = prompt + one completion, padded on the right.

    A row's padding repeats its own first token: under a causal mask no other token sees it, and nothing of another row
    ever enters.
    """

    gather_BT: Tensor
    """Pack position of each token of each row."""
    scatter_S: Tensor
    """Where each packed token's result stands among the B * T row tokens; a prompt's is taken from its first row."""
    prompts: list[tuple[int, int, int, int]]
    """(first row, last row + 1, first pack position, prompt length) of the prompts that several rows share."""


@dataclass(frozen=True)
class Pack:
    """Segments ready for one forward and backward pass. S tokens, E predictions."""

    input_ids_S: Tensor
    position_ids_S: Tensor
    spans: list[Span]
    rows: Rows
    sources_E: Tensor
    """Pack position whose hidden state predicts a completion token."""
    targets_E: Tensor
    scales_E: Tensor
    """A_k / Z_k of the trajectory of each prediction, float64."""
    behaviour_E: Tensor | None
    """log beta of each target; None where all are on-policy."""
    on_policy_E: Tensor
    """True where the segment has no behaviour log-probs, so that the ratio is 1."""
    predictions: list[Span]
    """Which stretch of the E predictions belongs to which result row."""

    @cached_property
    def tokens(self) -> int:
        return len(self.input_ids_S)


def plan(segments: Sequence[Segment], budget: int) -> list[list[Segment]]:
    """Segments by falling length in packs of at most `budget` tokens; one that is larger gets a pack of its own.

    Similar lengths together keep attention's padding small. The plan depends on nothing but the segments and budget.
    """
    order = sorted(segments, key=lambda s: (-s.longest, -s.tokens, s.index))
    packs: list[list[Segment]] = []
    room = 0
    for segment in order:
        if segment.tokens > room:
            packs.append([])
            room = budget
        packs[-1].append(segment)
        room -= segment.tokens
    return packs


def make_pack(segments: Sequence[Segment], device: torch.device) -> Pack:
    """Lay segments out for the model."""
    ids: list[int] = []
    positions: list[int] = []
    row_tokens: list[list[int]] = []
    scatter: list[tuple[int, int]] = []  # (row, column) of each packed token
    prompts: list[tuple[int, int, int, int]] = []
    spans: list[Span] = []
    sources: list[int] = []
    targets: list[int] = []
    scales: list[float] = []
    behaviour: list[float] = []
    on_policy: list[bool] = []
    predictions: list[Span] = []
    for segment in segments:
        start, first_row, first_prediction, length = len(ids), len(row_tokens), len(targets), len(segment.prompt_ids)
        ids += segment.prompt_ids
        positions += range(length)
        scatter += [(first_row, column) for column in range(length)]
        for k, completion in enumerate(segment.completions):
            begin, row = len(ids), len(row_tokens)
            ids += completion[:-1]
            positions += range(length, length + len(completion) - 1)
            scatter += [(row, length + column) for column in range(len(completion) - 1)]
            row_tokens.append([*range(start, start + length), *range(begin, len(ids))])
            sources += [start + length - 1, *range(begin, len(ids))]
            targets += completion
            scales += [segment.scales[k]] * len(completion)
            logprobs = segment.behaviour_logprobs
            behaviour += [0.0] * len(completion) if logprobs is None else logprobs[k]
            on_policy += [logprobs is None] * len(completion)
        if len(row_tokens) - first_row > 1:
            prompts.append((first_row, len(row_tokens), start, length))
        spans.append(Span(segment.index, start, len(ids)))
        predictions.append(Span(segment.index, first_prediction, len(targets)))
    width = max(len(row) for row in row_tokens)
    gather = [row + [row[0]] * (width - len(row)) for row in row_tokens]
    rows = Rows(
        torch.tensor(gather, device=device),
        torch.tensor([row * width + column for row, column in scatter], device=device),
        prompts,
    )
    return Pack(
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        spans,
        rows,
        torch.tensor(sources, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(scales, dtype=torch.float64, device=device),
        torch.tensor(behaviour, dtype=torch.float64, device=device) if not all(on_policy) else None,
        torch.tensor(on_policy, device=device),
        predictions,
    )
