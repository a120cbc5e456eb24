"""Dataset sampler that asks the curriculum for every generation batch, and remembers each answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from cropi.training.stage_sampler import BatchShape, StageSampler

# (number of the choice in the run, number of prompts) -> dataset positions
ChooseBatch = Callable[[int, int], list[int]]


class OnlineSampler(StageSampler):
    """Yields the layout of TRL's RepeatSampler with prompts that `choose` names, generation batch by generation batch.

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
        self._choose, self._draws = choose or self._in_order, draws
        self.choices: list[list[int]] = []

    def draw(self, prompts: int) -> list[int]:
        """Ask for the next prompts, for a trainer that takes as many as it needs."""
        self.choices.append(self._choose(len(self.choices), prompts))
        return self.choices[-1]

    def batch(self, number: int) -> list[int]:
        """Positions of a generation batch, which is chosen when it is first asked for."""
        return self.draw(self._shape.prompts) if number == len(self.choices) else self.choices[number]

    def __iter__(self) -> Iterator[int]:
        return super().__iter__() if self._draws else self._chosen()

    def _chosen(self) -> Iterator[int]:
        for number in range(self._stage * self._chunks, (self._stage + 1) * self._chunks):
            for _ in range(self._shape.repeats):
                for position in self.batch(number):
                    yield from [position] * self._shape.generations

    def _in_order(self, number: int, prompts: int) -> list[int]:
        before = (number - self._first_stage * self._chunks) * prompts
        return list(islice(self._walk(before), prompts))
