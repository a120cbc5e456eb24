"""What chooses the prompts of every generation batch while training runs, and what it may know beforehand."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from cropi.curriculum.curriculum import Choice, Halves
from cropi.curriculum.strategy import Candidates, FusionConfig, Ranking
from cropi.errors import ArtifactError

NEVER = -(1 << 40)  # the step of the last draw of a prompt that was not drawn
State = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Pool:
    """The prompts that can be trained on, and what the strategy reads of them; all else is empty."""

    prompt_ids: Sequence[str]
    seed: int
    generations: int = 8  # K, completions of a group
    batch: int = 8  # prompts of a batch
    scaling: Literal["group", "none"] = "group"  # of the trainer's advantages
    sources: Sequence[str] = ()
    texts: Sequence[str] = ()
    validation_texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    states_NE: Float[np.ndarray, "N E"] = field(default_factory=lambda: np.zeros((0, 0)))  # mean hidden states
    validation_states: Mapping[str, Float[np.ndarray, "M E"]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt_ids)


class PromptChooser(Protocol):
    """Chooses prompts batch by batch, and learns from what training does with them."""

    def next(self, count: int, step: int) -> list[Choice]:
        """Choose the prompts of a batch that `step` will train on; fewer than `count` only if the pool is smaller."""

    def observe(
        self,
        choice: Choice,
        rewards: Sequence[float],
        *,
        step: int,
        group: str,
        influence: Mapping[str, Halves] | None = None,
    ) -> None:
        """Take a finished group of a prompt. A `group` that was taken already is ignored."""

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger."""

    def table(self, prompt_ids: Sequence[str]) -> pa.Table:
        """What is known of every prompt of the pool."""

    def state_dict(self) -> dict[str, np.ndarray]:
        """Arrays from which `load_state_dict` continues bit for bit."""

    def load_state_dict(self, state: State) -> None:
        """Take over such a state."""


@runtime_checkable
class GroupGate(Protocol):
    """A chooser that trains on some of a generation batch's groups."""

    def kept(self, groups: Sequence[tuple[int, Sequence[float]]], batch: int) -> list[int]:
        """Return numbers of the groups, each a place and its rewards, that are trained on: one at least."""


class RewardChooser(ABC):
    """A `PromptChooser` that learns from rewards alone. A subclass has the belief and the rule."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.last_N = np.full(len(pool), NEVER)  # step of the last draw
        self.times_N = np.zeros(len(pool), dtype=np.int64)
        self._asked = 0  # calls of `next`
        self._step = -1  # the newest step of an observed group
        self._seen = set[str]()
        self._fingerprint = hashlib.sha256("\n".join(pool.prompt_ids).encode()).hexdigest()

    @abstractmethod
    def choose(self, count: int, step: int, generator: np.random.Generator) -> list[Choice]:
        """Choose `count` prompts, all different."""

    @abstractmethod
    def learn(self, place: int, rewards: Float[np.ndarray, " K"], step: int) -> None:
        """Take the rewards of a group."""

    @abstractmethod
    def beliefs(self) -> dict[str, np.ndarray]:
        """Return the arrays that `learn` changes, themselves and not copies."""

    def begin_step(self) -> None:  # noqa: B027 - most have nothing to do
        """Let a step pass: called before the first group of every step that is newer than all before."""

    def columns(self) -> dict[str, Any]:
        """Columns of the table by name."""
        return {}

    def next(self, count: int, step: int) -> list[Choice]:
        """Choose the prompts of a batch that `step` will train on; fewer than `count` only if the pool is smaller."""
        generator = np.random.default_rng([self.pool.seed, self._asked])
        self._asked += 1
        chosen = self.choose(min(count, len(self.pool)), step, generator)
        places = [choice.place for choice in chosen]
        self.last_N[places] = step
        self.times_N[places] += 1
        return chosen

    def observe(
        self,
        choice: Choice,
        rewards: Sequence[float],
        *,
        step: int,
        group: str,
        influence: Mapping[str, Halves] | None = None,
    ) -> None:
        """Take a finished group of a prompt. A `group` that was taken already is ignored."""
        if group in self._seen:
            return
        self._seen.add(group)
        if step > self._step:
            self._step = step
            self.begin_step()
        self.learn(choice.place, np.asarray(rewards, dtype=float), step)

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger."""
        return {"curriculum/seen": float((self.times_N > 0).mean())}

    def table(self, prompt_ids: Sequence[str]) -> pa.Table:
        """What is known of every prompt of the pool."""
        return pa.table({"prompt_id": list(prompt_ids), "times_drawn": self.times_N} | self.columns())

    def state_dict(self) -> dict[str, np.ndarray]:
        """Arrays from which `load_state_dict` continues bit for bit."""
        facts = {
            "prompts": self._fingerprint,
            "asked": self._asked,
            "step": self._step,
            "seen": sorted(self._seen),
        }
        found = {"facts": np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)}
        return found | {name: values.copy() for name, values in self._arrays().items()}

    def load_state_dict(self, state: State) -> None:
        """Take over such a state. ArtifactError if it is of other prompts, or of the same in another order."""
        facts = json.loads(state["facts"].tobytes().decode())
        if facts["prompts"] != self._fingerprint:
            raise ArtifactError(
                "the curriculum's state belongs to other prompts",
                fix="continue with the prompts that training began with.",
            )
        self._asked, self._step, self._seen = facts["asked"], facts["step"], set(facts["seen"])
        for name, values in self._arrays().items():
            values[...] = state[name]

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"last": self.last_N, "times": self.times_N} | self.beliefs()


class ChoosesBatches(ABC):
    """Mixin of strategies that choose every generation batch, and so rank nothing by stage."""

    takes_all: ClassVar[bool] = True
    collects: ClassVar[bool] = False
    chooses_online: ClassVar[bool] = True

    @abstractmethod
    def chooser(self, pool: Pool) -> PromptChooser:
        """Make the chooser of a run."""

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """s_i = 1 for every usable prompt: a stage may train on any, and each generation batch is chosen on its own."""
        return Ranking(np.ones(len(candidates)), candidates.usable_N, "chosen batch by batch")


def rested(last_N: Int[np.ndarray, " N"], step: int, cooldown: int, count: int) -> Bool[np.ndarray, " N"]:
    """Prompts that were not drawn in the last `cooldown` steps; the `count` longest undrawn where these are too few."""
    free_N: np.ndarray = last_N < step - cooldown
    return free_N if free_N.sum() >= count else np.argsort(np.argsort(last_N, kind="stable")) < count
