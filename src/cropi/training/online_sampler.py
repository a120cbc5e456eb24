"""Dataset sampler that asks the curriculum for every generation batch, and remembers each answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
        self._choose, self._draws = choose, draws
        self.choices: list[list[int]] = []
        self._stage = 0

    def start_stage(self, stage: int, positions: object, first_stage: int, *, consumed: int | None = None) -> None:
        """Go on with the batches of a stage."""
        super().start_stage(stage, positions, first_stage, consumed=consumed)  # type: ignore[arg-type]
        self._stage = stage

    def draw(self, prompts: int) -> list[int]:
        """Ask for the next prompts, for a trainer that takes as many as it needs."""
        chosen = super().draw(prompts) if self._choose is None else self._choose(len(self.choices), prompts)
        self.choices.append(chosen)
        return chosen

    def __iter__(self) -> Iterator[int]:
        return super().__iter__() if self._draws else self._chosen()

    def _chosen(self) -> Iterator[int]:
        walk = self._walk()
        for number in range(self._stage * self._chunks, (self._stage + 1) * self._chunks):
            in_order = [next(walk) for _ in range(self._shape.prompts)]
            if number == len(self.choices):
                chosen = in_order if self._choose is None else self._choose(number, self._shape.prompts)
                self.choices.append(chosen)
            for _ in range(self._shape.repeats):
                for position in self.choices[number]:
                    yield from [position] * self._shape.generations
