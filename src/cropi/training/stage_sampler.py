"""Dataset samplers of a stage: of its selection in random order, and of what a curriculum chooses batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

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
        self._positions, self._stage, self._first_stage = tuple(sorted(positions)), stage, first_stage
        self._consumed = (stage - first_stage) * self._chunks * self._shape.prompts if consumed is None else consumed
        self._drawing = self._walk(self._consumed)

    def draw(self, prompts: int) -> list[int]:
        """Draw the next prompts of the stage, for a trainer that takes as many as it needs.

        Iteration yields the same sequence, with a counter of its own.
        """
        return list(islice(self._drawing, prompts))

    def batch(self, number: int) -> list[int]:
        """Positions of a generation batch, counted over all stages."""
        before = self._consumed + (number - self._stage * self._chunks) * self._shape.prompts
        return list(islice(self._walk(before), self._shape.prompts))

    def __iter__(self) -> Iterator[int]:
        for number in range(self._stage * self._chunks, (self._stage + 1) * self._chunks):
            batch = self.batch(number)
            for _ in range(self._shape.repeats):
                for position in batch:
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


# (number of the choice in the run, number of prompts) -> dataset positions
ChooseBatch = Callable[[int, int], list[int]]


class OnlineSampler(StageSampler):
    """Yields prompts that `choose` names, generation batch by generation batch, in the same layout.

    The loader fetches a batch before the one in front of it is trained on, so a choice knows the rewards of all batches
    but the newest. After a resume TRL skips the batches it has trained on: these, and those that were drawn before the
    checkpoint, come from `choices`. No batch is asked for twice.

    With dynamic sampling the trainer draws as it samples, and what the loader fetches is not used.
    """

    def __init__(
        self, shape: BatchShape, chunks_per_stage: int, seed: int, choose: ChooseBatch | None, *, draws: bool = False
    ) -> None:
        """`choose` None: the order of a `StageSampler`, remembered in the same way. `draws`: the trainer draws."""
        super().__init__(shape, chunks_per_stage, seed)
        self._choose, self._draws = choose, draws
        self.choices: list[list[int]] = []

    def draw(self, prompts: int) -> list[int]:
        """Ask for the next prompts, for a trainer that takes as many as it needs."""
        number = len(self.choices)
        self.choices.append(super().batch(number) if self._choose is None else self._choose(number, prompts))
        return self.choices[-1]

    def batch(self, number: int) -> list[int]:
        """Positions of a generation batch, which is chosen when it is first asked for."""
        if self._draws:
            return super().batch(number)
        return self.draw(self._shape.prompts) if number == len(self.choices) else self.choices[number]
