"""The sampler of a stage: exactly the selected prompts, in exactly the stage's number of batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from cropi.seeds import derived_seed


@dataclass(frozen=True)
class BatchShape:
    """How TRL cuts a generation batch.

    A chunk of `prompts` prompts, each repeated `generations` times, is one generation batch; TRL asks for it `repeats`
    times, once for every micro-step that it serves. The prompts of a chunk differ unless the selection is smaller.
    """

    prompts: int
    generations: int
    repeats: int


class StageSampler(Sampler[int]):
    """Yields dataset positions in the layout of TRL's RepeatSampler, from the current stage's selection only.

    The selection is walked through in a random order that is drawn anew for every pass; a selection smaller than a
    generation batch is repeated rather than dropped. A stage with the same selection as the stage before goes on where
    that one stopped, so that on the full pool every prompt is seen once before any is seen twice. The order depends on
    the seed and on where the selection began, so a resumed run sees the same batches.
    """

    def __init__(self, shape: BatchShape, chunks_per_stage: int, seed: int) -> None:
        self._shape, self._chunks, self._seed = shape, chunks_per_stage, seed
        self._positions: tuple[int, ...] = ()
        self._first_stage = self._consumed = 0
        self._drawing: Iterator[int] = iter(())

    def start_stage(
        self, stage: int, positions: Sequence[int], first_stage: int, *, consumed: int | None = None
    ) -> None:
        """Sample from `positions` from now on; `first_stage` is the first of the stages in a row that share them.

        `consumed` is how many prompts those before have taken, where that is not what they take without refills.
        """
        if not positions:
            raise ValueError(f"stage {stage} has no prompts")
        self._positions, self._first_stage = tuple(sorted(positions)), first_stage
        self._consumed = (stage - first_stage) * self._chunks * self._shape.prompts if consumed is None else consumed
        self._drawing = self._walk()

    def draw(self, prompts: int) -> list[int]:
        """The next prompts of the stage, for a trainer that takes as many as it needs and not what a loader brings.

        Draws go on from each other; what iteration yields is the same walk, counted apart.
        """
        return [next(self._drawing) for _ in range(prompts)]

    def __iter__(self) -> Iterator[int]:
        if not self._positions:
            raise RuntimeError("the sampler was asked for batches before its first stage was started")
        walk = self._walk()
        for _ in range(self._chunks):
            chunk = [next(walk) for _ in range(self._shape.prompts)]
            for _ in range(self._shape.repeats):
                for position in chunk:
                    yield from [position] * self._shape.generations

    def _walk(self) -> Iterator[int]:
        """The endless sequence of prompts, from the place where this stage begins."""
        passes, skip = divmod(self._consumed, len(self._positions))
        while True:
            generator = torch.Generator().manual_seed(derived_seed(self._seed, "order", self._first_stage, passes))
            order = torch.randperm(len(self._positions), generator=generator).tolist()
            yield from (self._positions[row] for row in order[skip:])
            passes, skip = passes + 1, 0

    def __len__(self) -> int:
        return self._chunks * self._shape.prompts * self._shape.generations * self._shape.repeats
