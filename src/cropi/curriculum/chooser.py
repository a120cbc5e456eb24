"""Choosers: they choose the prompts of every generation batch while training runs."""

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

from cropi.curriculum.strategy import Candidates, FusionConfig, Ranking
from cropi.errors import ArtifactError

NEVER = -(1 << 40)  # the step of the last draw of a prompt that was not drawn
State = Mapping[str, np.ndarray]
Source = Literal["mean", "draw", "likeness", "learnability", "uniform"]
Halves = Sequence[Sequence[float]]
"""Inner products of a group's gradient: two halves of its completions x two halves of the direction."""


@dataclass(frozen=True)
class Choice:
    """A prompt that was chosen, and why."""

    place: int
    source: Source
    validation_set: str  # empty if drawn uniformly


@dataclass(frozen=True)
class Pool:
    """The prompts that can be trained on, and what the strategy reads of them; all else is empty."""

    prompt_ids: Sequence[str]
    seed: int
    generations: int = 8  # K, completions of a group
    batch: int = 8  # prompts that are sampled a training step
    scaling: Literal["group", "none"] = "group"  # of the trainer's advantages
    sources: Sequence[str] = ()
    texts: Sequence[str] = ()
    validation_texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    states_NE: Float[np.ndarray, "N E"] = field(default_factory=lambda: np.zeros((0, 0)))  # mean hidden states
    validation_states: Mapping[str, Float[np.ndarray, "M E"]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt_ids)


class PromptChooser(ABC):
    """Chooses prompts batch by batch, and learns from what training does with them.

    Free of any trainer. `next` may be asked again before anything is observed, as loaders that fetch ahead do.
    """

    def __init__(self, count: int, seed: int, fingerprint: str) -> None:
        """`count` prompts, which `fingerprint` identifies with all that is known of them beforehand."""
        self.last_N = np.full(count, NEVER)  # step of the last draw
        self.times_N = np.zeros(count, dtype=np.int64)
        self._seed, self._fingerprint = seed, fingerprint
        self._asked = 0  # calls of `next`
        self._seen = set[str]()

    @abstractmethod
    def choose(self, count: int, step: int, generator: np.random.Generator) -> list[Choice]:
        """Choose `count` prompts, all different."""

    @abstractmethod
    def take(
        self, choice: Choice, rewards: Float[np.ndarray, " K"], step: int, influence: Mapping[str, Halves] | None
    ) -> None:
        """Learn from a group that was not taken before."""

    @abstractmethod
    def columns(self) -> dict[str, Any]:
        """Columns of the table by name."""

    @abstractmethod
    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """JSON values and copies of arrays from which `restore` continues."""

    @abstractmethod
    def restore(self, facts: Mapping[str, Any], arrays: State) -> None:
        """Take over such a state."""

    def next(self, count: int, step: int) -> list[Choice]:
        """Choose the prompts of a batch that `step` will train on; fewer than `count` only if the pool is smaller."""
        generator = np.random.default_rng([self._seed, self._asked])
        self._asked += 1
        chosen = self.choose(min(count, len(self.last_N)), step, generator)
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
        """Take a finished group of a prompt: its rewards, and its influence on each set if a direction was known.

        A `group` that was taken already is ignored. `influence` has the inner products of the two halves of the group's
        gradient with the two halves of the direction, in any unit that stays the same.
        """
        if group not in self._seen:
            self._seen.add(group)
            self.take(choice, np.asarray(rewards, dtype=float), step, influence)

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger."""
        return {"curriculum/seen": float((self.times_N > 0).mean())}

    def table(self, prompt_ids: Sequence[str]) -> pa.Table:
        """Return what is known of every prompt of the pool."""
        return pa.table({"prompt_id": list(prompt_ids), "times_drawn": self.times_N} | self.columns())

    def state_dict(self) -> dict[str, np.ndarray]:
        """Arrays from which `load_state_dict` continues bit for bit."""
        own, arrays = self.state()
        facts = {"prompts": self._fingerprint, "asked": self._asked, "seen": sorted(self._seen), **own}
        found = {"facts": np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)}
        return found | {"last": self.last_N.copy(), "times": self.times_N.copy()} | arrays

    def load_state_dict(self, state: State) -> None:
        """Take over such a state; choices after it are those that would have followed.

        ArtifactError if it is of other prompts, or of the same in another order.
        """
        facts = json.loads(state["facts"].tobytes().decode())
        if facts.get("prompts") != self._fingerprint:
            raise ArtifactError(
                "the curriculum's state belongs to other prompts or representations",
                fix="continue with the prompts and the policy that training began with.",
            )
        self._asked, self._seen = facts["asked"], set(facts["seen"])
        self.last_N, self.times_N = state["last"].copy(), state["times"].copy()
        self.restore(facts, state)


@runtime_checkable
class GroupGate(Protocol):
    """A chooser that trains on some of a generation batch's groups."""

    def kept(self, groups: Sequence[tuple[int, Sequence[float]]], batch: int) -> list[int]:
        """Return numbers of the groups, each a place and its rewards, that are trained on: one at least."""


class RewardChooser(PromptChooser):
    """A chooser that learns from rewards alone. A subclass has the belief and the rule."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(len(pool), pool.seed, hashlib.sha256("\n".join(pool.prompt_ids).encode()).hexdigest())
        self.pool = pool
        self._step = -1  # the newest step of an observed group
        self._extremes = [0.0, 1.0]  # of all rewards so far, at least that of verdicts

    @abstractmethod
    def learn(self, place: int, rewards: Float[np.ndarray, " K"], step: int) -> None:
        """Take the rewards of a group, from 0 to 1."""

    @abstractmethod
    def beliefs(self) -> dict[str, np.ndarray]:
        """Return the arrays that `learn` changes, themselves and not copies."""

    def begin_step(self) -> None:
        """Let a step pass: called before the first group of every step that is newer than all before."""

    def take(
        self, choice: Choice, rewards: Float[np.ndarray, " K"], step: int, influence: Mapping[str, Halves] | None
    ) -> None:
        if step > self._step:
            self._step = step
            self.begin_step()
        self.learn(choice.place, self.scaled(rewards), step)

    def scaled(self, rewards: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
        """Map rewards to [0, 1], by the range of all so far: these rules are made for verdicts."""
        low, high = self._extremes
        low, high = self._extremes = [float(rewards.min(initial=low)), float(rewards.max(initial=high))]
        return (rewards - low) / (high - low)

    def columns(self) -> dict[str, Any]:
        return {}

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"step": self._step, "range": self._extremes}, {
            name: values.copy() for name, values in self.beliefs().items()
        }

    def restore(self, facts: Mapping[str, Any], arrays: State) -> None:
        self._step, self._extremes = facts["step"], facts["range"]
        for name, values in self.beliefs().items():
            values[...] = arrays[name]


class ChoosesBatches(ABC):
    """Mixin of strategies that choose every generation batch, and so rank nothing by stage."""

    takes_all: ClassVar[bool] = True
    chooses_online: ClassVar[bool] = True

    @abstractmethod
    def chooser(self, pool: Pool) -> PromptChooser:
        """Make the chooser of a run."""

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """s_i = 1 for every usable prompt: a stage may train on any, and each generation batch is chosen on its own."""
        return Ranking(np.ones(len(candidates)), candidates.usable_N, "chosen batch by batch")


def rested(last_N: Int[np.ndarray, " N"], step: int, cooldown: int, count: int) -> Bool[np.ndarray, " N"]:
    """Prompts that were not drawn in the last `cooldown` steps nor, with one, in the last two batches.

    The groups of the last two may not have been observed, and a batch may serve several steps. Where these prompts are
    too few, the `count` longest undrawn.
    """
    end = step - cooldown
    if cooldown:
        newest = int(last_N.max(initial=NEVER))
        before = int(last_N[last_N < newest].max(initial=NEVER))
        end = min([end, *(drawn for drawn in (before, newest) if drawn > NEVER)])
    free_N: np.ndarray = last_N < end
    return free_N if free_N.sum() >= count else np.argsort(np.argsort(last_N, kind="stable")) < count


def in_proportion(weights_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Probabilities in proportion to weights; equal ones where all weights are 0, as while no two rewards differ."""
    total = float(weights_N.sum())
    return weights_N / total if total > 0 else np.full(len(weights_N), 1 / len(weights_N))


def below(state: State, prefix: str) -> dict[str, np.ndarray]:
    """The part of a state whose names begin with a prefix, without it."""
    return {key.removeprefix(prefix): values for key, values in state.items() if key.startswith(prefix)}
