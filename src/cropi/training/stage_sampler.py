"""Dataset sampler of a stage: the selected prompts, in the stage's number of batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler
from trl import GRPOConfig

from cropi.seeds import derived_seed


@dataclass(frozen=True)
class BatchShape:
    """Layout of a generation batch in TRL.

    A generation batch has `prompts` prompts, each repeated `generations` times. TRL requests it `repeats` times, once
    for every micro-step that it serves. Its prompts differ unless the selection is smaller.
    """

    prompts: int
    generations: int
    repeats: int

    @classmethod
    def of(cls, settings: GRPOConfig, iterations: int) -> BatchShape:
        """The layout under a trainer's settings, with so many passes over a generation batch."""
        prompts = settings.generation_batch_size // settings.num_generations
        return cls(prompts, settings.num_generations, settings.steps_per_generation * iterations)


class StageSampler(Sampler[int]):
    """Yields dataset positions in the layout of TRL's RepeatSampler, from the current stage's selection only.

    Each pass through the selection has a new random order; a selection smaller than a generation batch is repeated. A
    stage with the same selection as the previous one continues its pass, so that on the full pool every prompt is seen
    once before any is seen twice. The order depends on the seed and the first stage of the selection, so a resumed run
    sees the same batches.
    """

    def __init__(self, shape: BatchShape, chunks_per_stage: int, seed: int) -> None:
        self._shape, self._chunks, self._seed = shape, chunks_per_stage, seed
        self._positions: tuple[int, ...] = ()
        self._stage = self._first_stage = self._consumed = 0
        self._drawing: Iterator[int] = iter(())

    def start_stage(
        self, stage: int, positions: Sequence[int], first_stage: int, *, consumed: int | None = None
    ) -> None:
        """Sample from `positions` from now on; `first_stage` is the first of the consecutive stages that share them.

        `consumed` counts the prompts that earlier ones of these stages drew. Unset: the number without refills.
        """
        if not positions:
            raise ValueError(f"stage {stage} has no prompts")
        self._positions, self._stage, self._first_stage = tuple(sorted(positions)), stage, first_stage
        self._consumed = (stage - first_stage) * self._chunks * self._shape.prompts if consumed is None else consumed
        self._drawing = self._walk(self._consumed)

    def draw(self, prompts: int) -> list[int]:
        """Draw the next prompts of the stage, for a trainer that takes as many as it needs.

        Iteration yields the same sequence, with a counter of its own.
        """
        return [next(self._drawing) for _ in range(prompts)]

    def __iter__(self) -> Iterator[int]:
        if not self._positions:
            raise RuntimeError("the sampler was asked for batches before its first stage was started")
        walk = self._walk(self._consumed)
        for _ in range(self._chunks):
            chunk = [next(walk) for _ in range(self._shape.prompts)]
            for _ in range(self._shape.repeats):
                for position in chunk:
                    yield from [position] * self._shape.generations

    def _walk(self, consumed: int) -> Iterator[int]:
        """Yield prompts without end, after so many of this selection."""
        passes, skip = divmod(consumed, len(self._positions))
        while True:
            generator = torch.Generator().manual_seed(derived_seed(self._seed, "order", self._first_stage, passes))
            order = torch.randperm(len(self._positions), generator=generator).tolist()
            yield from (self._positions[row] for row in order[skip:])
            passes, skip = passes + 1, 0

    def __len__(self) -> int:
        return self._chunks * self._shape.prompts * self._shape.generations * self._shape.repeats
