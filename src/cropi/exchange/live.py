"""Choosers inside other trainers while they train: prime-rl, Trinity-RFT and TRL's AsyncGRPO. Free of all three.

They learn from rewards alone: none of these shows its backward passes to what chooses. A chooser is made by a
strategy, such as `MoppsStrategy(type="mopps").chooser`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cropi.curriculum.chooser import Choice, GroupGate, Pool, PromptChooser
from cropi.errors import ConfigError

MakeChooser = Callable[[Pool], PromptChooser]
PLACE = "curriculum_place"  # a column of the rows of a stream


class LiveChooser:
    """A chooser that is asked for prompts and told of groups in any order, with steps counted by the groups told."""

    def __init__(
        self, prompt_ids: Sequence[str], make: MakeChooser, *, batch: int, generations: int, seed: int
    ) -> None:
        self._chooser = make(Pool(list(prompt_ids), seed, generations=generations, batch=batch))
        self._batch = batch
        self._told, self._keeps_newest = 0, False
        self._newest = deque[tuple[int, Sequence[float]]](maxlen=batch)  # groups, as places and rewards
        self._waiting = deque[Choice]()  # chosen and not asked for yet
        self._open: dict[int, Choice] = {}  # by place: asked for and not told of

    def next(self) -> int:
        """The place of the next prompt."""
        if not self._waiting:
            self._waiting.extend(self._chooser.next(self._batch, self._told // self._batch))
        choice = self._waiting.popleft()
        self._open[choice.place] = choice
        return choice.place

    def tell(self, place: int, rewards: Sequence[float]) -> None:
        """A group of a prompt is finished. Without a judged completion it tells nothing."""
        if not rewards:
            return
        choice = self._open.pop(place, Choice(place, "uniform", ""))
        self._newest.append((place, list(rewards)))
        if isinstance(self._chooser, GroupGate):  # before it is observed
            self._keeps_newest = len(self._newest) - 1 in self._chooser.kept(list(self._newest), self._told)
        self._chooser.observe(choice, rewards, step=self._told // self._batch, group=str(self._told))
        self._told += 1

    @property
    def leaves_out_groups(self) -> bool:
        """Whether the chooser trains on some of the groups alone."""
        return isinstance(self._chooser, GroupGate)

    def keeps_newest(self) -> bool:
        """Whether a chooser that trains on some groups keeps the newest, in a batch with those told before it."""
        return self._keeps_newest

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger."""
        return self._chooser.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Plain values, which JSON can hold."""
        arrays = self._chooser.state_dict()
        state = {name: [str(a.dtype), list(a.shape), a.ravel().tolist()] for name, a in arrays.items()}
        waiting = [[choice.place, choice.source] for choice in self._waiting]
        return {
            "chooser": state,
            "told": self._told,
            "waiting": waiting,
            "newest": [list(g) for g in self._newest],
            "keeps_newest": self._keeps_newest,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from such a state."""
        arrays = state_dict["chooser"].items()
        self._chooser.load_state_dict(
            {name: np.array(a, dtype=kind).reshape(shape) for name, (kind, shape, a) in arrays}
        )
        self._told, self._keeps_newest, self._open = state_dict["told"], state_dict["keeps_newest"], {}
        self._waiting = deque(Choice(place, source, "") for place, source in state_dict["waiting"])
        self._newest = deque(((place, rewards) for place, rewards in state_dict["newest"]), self._batch)


class PrimeSampler(LiveChooser, Iterator[Any]):
    """A `TaskSampler` of prime-rl's orchestrator. Its config knows its own samplers only: set `curriculum.sampler`."""

    def __init__(
        self, tasks: Sequence[Any], make: MakeChooser, *, batch: int = 64, generations: int = 8, seed: int = 0
    ) -> None:
        self._tasks, self._places = list(tasks), {task.key: place for place, task in enumerate(tasks)}
        if len(self._places) < len(self._tasks):
            raise ConfigError(
                "several tasks have the same key", where="PrimeSampler", fix="give each a key of its own."
            )
        super().__init__(list(self._places), make, batch=batch, generations=generations, seed=seed)

    def __next__(self) -> Any:
        return self._tasks[self.next()]

    def observe(self, group: Sequence[Any]) -> None:
        """Take a finalised group of episode runs: the rewards of its trainable traces without an error."""
        self.tell(self._places[group[0].context.task.key], _judged(group))


class PrimeGate:
    """An `AdmissionGate` of prime-rl's, for a strategy that trains on some of the groups (`lze`).

    prime-rl decides group by group, after its sampler has observed it: a group with different rewards is admitted if it
    is kept in a batch with those before it. Set `curriculum.gates["cropi"]`. The sampler keeps the state.
    """

    def __init__(self, sampler: PrimeSampler) -> None:
        if not sampler.leaves_out_groups:
            raise ConfigError("this strategy trains on all groups", where="PrimeGate", fix="use lze, or no gate.")
        self._sampler = sampler

    def admit(self, group: Sequence[Any]) -> bool:
        """Whether a group that was just observed enters the training batch."""
        return len(set(_judged(group))) > 1 and self._sampler.keeps_newest()

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing of its own."""

    def metrics(self) -> dict[str, float]:
        """Nothing of its own."""
        return {}


def _judged(group: Sequence[Any]) -> list[float]:
    """Rewards of the trainable traces of a group of prime-rl's that have no error."""
    traces = [trace for run in group for trace in run.traces]
    return [trace.reward for trace in traces if not trace.has_error and trace.agent.trainable]


class TrinitySelector(LiveChooser):
    """A `BaseSelector` of Trinity-RFT's. It sees pass rates, which stand for as many verdicts as a group has.

    A subclass registers it: `SELECTORS.register_module("mopps")(...)`, with `make` as a class attribute.
    """

    make: MakeChooser
    generations = 8

    def __init__(self, data_source: Any, config: Any) -> None:
        count = len(data_source.dataset)
        batch, seed = int(getattr(config, "batch_size", 0) or 32), int(getattr(config, "seed", 0) or 0)
        ids = [str(place) for place in range(count)]
        super().__init__(ids, type(self).make, batch=batch, generations=self.generations, seed=seed)

    def get_indices(self, batch_size: int, return_extra_info: bool = False) -> Any:
        """Places of the next prompts."""
        places = [self.next() for _ in range(batch_size)]
        return (places, {"indices": places}) if return_extra_info else places

    def update(self, indices: Sequence[int], values: Sequence[float]) -> None:
        """Take the pass rates of some prompts."""
        for place, rate in zip(indices, values, strict=True):
            right = round(float(rate) * self.generations)
            self.tell(int(place), [1.0] * right + [0.0] * (self.generations - right))


class PromptStream(LiveChooser):
    """Prompts for TRL's AsyncGRPO: a `train_dataset` that its rollout worker iterates, and a reward function.

        stream = PromptStream(rows, MoppsStrategy(type="mopps").chooser)
        AsyncGRPOTrainer(..., train_dataset=stream, reward_funcs=StreamReward(stream, accuracy))

    The worker takes both into a process of its own. There they share what they know; a checkpoint does not hold it.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        make: MakeChooser,
        *,
        batch: int = 64,
        generations: int = 8,
        seed: int = 0,
    ) -> None:
        self._rows, ids = rows, [str(place) for place in range(len(rows))]
        super().__init__(ids, make, batch=batch, generations=generations, seed=seed)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            place = self.next()
            yield dict(self._rows[place]) | {PLACE: place}


class StreamReward:
    """The sum of reward functions, as TRL adds them; tells a stream of every group. None where all give None."""

    def __init__(self, stream: PromptStream, *functions: Callable[..., Any]) -> None:
        self._stream, self._functions = stream, functions
        self.__name__ = "reward"

    async def __call__(self, **columns: Any) -> list[float | None]:
        """Rewards of a group."""
        found = await asyncio.gather(*(_called(function, columns) for function in self._functions))
        known = [[value for value in own if value is not None] for own in zip(*found, strict=True)]
        self._stream.tell(columns[PLACE][0], [sum(own) for own in known if own])
        return [sum(own) if own else None for own in known]


async def _called(function: Callable[..., Any], columns: Mapping[str, Any]) -> Sequence[float | None]:
    if inspect.iscoroutinefunction(function):
        return await function(**columns)
    return await asyncio.to_thread(function, **columns)
