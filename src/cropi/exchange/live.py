"""Choosers inside other trainers while they train: prime-rl's task sampler and Trinity-RFT's selector. Free of both.

They learn from rewards alone: neither trainer shows its backward passes to what chooses. A chooser is made by a
strategy, such as `MoppsStrategy(type="mopps").chooser`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cropi.curriculum.chooser import Choice, Pool, PromptChooser

MakeChooser = Callable[[Pool], PromptChooser]


class LiveChooser:
    """A chooser that is asked for prompts and told of groups in any order, with steps counted by the groups told."""

    def __init__(
        self, prompt_ids: Sequence[str], make: MakeChooser, *, batch: int, generations: int, seed: int
    ) -> None:
        self._chooser = make(Pool(list(prompt_ids), seed, generations=generations, batch=batch))
        self._ids, self._batch = list(prompt_ids), batch
        self._told = 0
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
        self._chooser.observe(choice, rewards, step=self._told // self._batch, group=str(self._told))
        self._told += 1

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger."""
        return self._chooser.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Plain values, which JSON can hold."""
        arrays = self._chooser.state_dict()
        state = {name: [str(a.dtype), list(a.shape), a.ravel().tolist()] for name, a in arrays.items()}
        return {"chooser": state, "told": self._told, "waiting": [[c.place, c.source] for c in self._waiting]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""
        arrays = {name: np.array(a, dtype=kind).reshape(shape) for name, (kind, shape, a) in state["chooser"].items()}
        self._chooser.load_state_dict(arrays)
        self._told, self._open = state["told"], {}
        self._waiting = deque(Choice(place, source, "") for place, source in state["waiting"])


class PrimeSampler(Iterator[Any]):
    """A `TaskSampler` of prime-rl's orchestrator. Its config knows its own samplers only: set `curriculum.sampler`."""

    def __init__(
        self, tasks: Sequence[Any], make: MakeChooser, *, batch: int = 64, generations: int = 8, seed: int = 0
    ) -> None:
        self._tasks, self._places = list(tasks), {task.key: place for place, task in enumerate(tasks)}
        self._live = LiveChooser(list(self._places), make, batch=batch, generations=generations, seed=seed)

    def __next__(self) -> Any:
        return self._tasks[self._live.next()]

    def observe(self, group: Sequence[Any]) -> None:
        """Take a finalised group: the rewards of its trainable traces without an error."""
        traces = [trace for episode in group if episode.ok for trace in episode.traces]
        judged = [t.reward for t in traces if not t.has_error and t.agent.trainable and t.num_turns > 0]
        self._live.tell(self._places[group[0].task.key], judged)

    def state_dict(self) -> dict[str, Any]:
        """State for prime-rl's checkpoint."""
        return self._live.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._live.load_state_dict(state_dict)

    def metrics(self) -> dict[str, float]:
        """Numbers for prime-rl's logger."""
        return self._live.metrics()


class TrinitySelector:
    """A `BaseSelector` of Trinity-RFT's. It sees pass rates, which stand for as many verdicts as a group has.

    A subclass registers it: `SELECTORS.register_module("mopps")(...)`, with `make` as a class attribute.
    """

    make: MakeChooser
    generations = 8

    def __init__(self, data_source: Any, config: Any) -> None:
        count = len(data_source.dataset)
        batch, seed = int(getattr(config, "batch_size", 0) or 32), int(getattr(config, "seed", 0) or 0)
        ids = [str(place) for place in range(count)]
        self._live = LiveChooser(ids, type(self).make, batch=batch, generations=self.generations, seed=seed)

    def get_indices(self, batch_size: int, return_extra_info: bool = False) -> Any:
        """Places of the next prompts."""
        places = [self._live.next() for _ in range(batch_size)]
        return (places, {"indices": places}) if return_extra_info else places

    def update(self, indices: Sequence[int], values: Sequence[float]) -> None:
        """Take the pass rates of some prompts."""
        for place, rate in zip(indices, values, strict=True):
            right = round(float(rate) * self.generations)
            self._live.tell(int(place), [1.0] * right + [0.0] * (self.generations - right))

    def state_dict(self) -> dict[str, Any]:
        """State for Trinity's checkpoint."""
        return self._live.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._live.load_state_dict(state_dict)
