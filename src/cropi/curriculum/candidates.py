"""What a strategy sees, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from cropi.artifacts import USABLE
from cropi.reward_statistics import Visit


@dataclass(frozen=True)
class Evidence:
    """What the newest scoring and the policy's representations say of N training and M validation prompts."""

    names: Sequence[str]  # of the validation sets
    representations_NE: Float[np.ndarray, "N E"]
    tries_N: Float[np.ndarray, " N"]  # stored trajectories; 0 where the newest are training's own, which are visits
    tried_at_N: Float[np.ndarray, " N"]  # the optimiser step at which they were sampled
    strengths_N: Float[np.ndarray, " N"]  # variance of the rewards as it was scored; 0 where nothing was
    influence_NV: Float[np.ndarray, "N V"]
    errors_NV: Float[np.ndarray, "N V"]  # standard errors
    validation_sets: Sequence[str]  # whose prompts the M are
    validation_ME: Float[np.ndarray, "M E"]
    validation_tries_M: Float[np.ndarray, " M"]
    validation_tried_at: float
    validation_pass_rates_M: Float[np.ndarray, " M"]
    validation_variances_M: Float[np.ndarray, " M"]  # of the rewards
    validation_strengths_M: Float[np.ndarray, " M"]
    validation_influence_MV: Float[np.ndarray, "M V"]  # on the other prompts of the set
    validation_errors_MV: Float[np.ndarray, "M V"]


@dataclass(frozen=True)
class Candidates:
    """The training pool at the start of a stage, in ascending order of prompt id."""

    prompt_ids: Sequence[str]
    sources: Sequence[str]
    statuses: Sequence[str]
    pass_rates_N: Float[np.ndarray, " N"]  # mean rewards of the stored trajectories; NaN where there is no reward
    variances_N: Float[np.ndarray, " N"]  # of these rewards, p (1 - p) where they are 0 and 1; NaN likewise
    training_variances: Mapping[str, float]  # of the newest training rewards by prompt id, for prompts trained on
    influence: Mapping[str, Float[np.ndarray, " N"]]  # by direction; empty for strategies that do not ask for it
    stage: int
    seed: int
    stages: int = 1  # of the run
    steps_per_stage: int = 1
    group_sizes_N: Int[np.ndarray, " N"] | None = None  # K of the stored trajectories; 0 where there are none
    lengths_N: Float[np.ndarray, " N"] | None = None  # |g_i|; NaN where it was not computed
    visits: Sequence[Visit] = ()  # all training before this stage, in order
    texts: Sequence[str] = ()  # of the prompts
    evidence: Evidence | None = None  # for strategies that pool
    validation_texts: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by validation set

    def __post_init__(self) -> None:
        if any(first >= second for first, second in pairwise(self.prompt_ids)):
            raise ValueError("prompt ids must be distinct and in ascending order: ties are broken by place")

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def usable_N(self) -> Bool[np.ndarray, " N"]:
        """Prompts that can be trained on: with an answer that can be read, and trajectories."""
        return np.array([status in USABLE for status in self.statuses])

    @property
    def hopeful_N(self) -> Bool[np.ndarray, " N"]:
        """Prompts that a pass rate may speak for: usable, with trajectories, and not graded all alike between 0 and 1,
        where p looks like signal and is none."""
        p_N = self.pass_rates_N
        alike_N = (self.variances_N == 0) & (p_N > 0) & (p_N < 1)
        return self.usable_N & ~np.isnan(p_N) & ~alike_N


@dataclass(frozen=True)
class Ranking:
    """A strategy's answer: a score for every prompt (higher is better) and which prompts may be chosen at all."""

    scores_N: Float[np.ndarray, " N"]
    eligible_N: Bool[np.ndarray, " N"]
    reason: str
    set_ranks: Mapping[str, Int[np.ndarray, " N"]]  # rank by validation set, for strategies that fuse several
    facts: Mapping[str, Any] = field(default_factory=dict)  # what the strategy found on the way, for the manifest
