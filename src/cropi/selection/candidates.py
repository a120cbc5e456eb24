"""What a strategy sees, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from cropi.artifacts import USABLE


@dataclass(frozen=True)
class Candidates:
    """The training pool at the start of a stage, in ascending order of prompt id."""

    prompt_ids: Sequence[str]
    sources: Sequence[str]
    statuses: Sequence[str]
    pass_rates_N: Float[np.ndarray, " N"]  # of the stored trajectories; NaN where there is no reward
    training_pass_rates: Mapping[str, float]  # newest mean training reward by prompt id, for prompts trained on so far
    influence: Mapping[str, Float[np.ndarray, " N"]]  # by validation set; empty for strategies that do not ask for it
    stage: int
    seed: int

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def usable_N(self) -> Bool[np.ndarray, " N"]:
        """Prompts that can be trained on: with an answer that can be read, and trajectories."""
        return np.array([status in USABLE for status in self.statuses])


@dataclass(frozen=True)
class Ranking:
    """A strategy's answer: a score for every prompt (higher is better) and which prompts may be chosen at all."""

    scores_N: Float[np.ndarray, " N"]
    eligible_N: Bool[np.ndarray, " N"]
    reason: str
    set_ranks: Mapping[str, Int[np.ndarray, " N"]]  # rank by validation set, for strategies that fuse several
