"""The task of a contender, and what it measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class WeightedGroup:
    """The trajectories of a prompt, whose gradient is sum_k weights_k sum_t grad log pi(x_{k,t})."""

    prompt_id: str
    prompt_ids: list[int]
    completions: list[list[int]]
    weights: list[float]

    @property
    def has_signal(self) -> bool:
        return any(self.weights)


@dataclass(frozen=True)
class Task:
    """The policy and the groups of a contender."""

    model: str
    groups: list[WeightedGroup]
    validation: list[WeightedGroup]
    dtype: str = "float32"
    device: str = "cpu"
    batch_tokens: int = 1024
    threads: int = 1
    contender: str = ""


@dataclass(frozen=True)
class Part:
    """A part of a run with its own time."""

    seconds: float
    tokens_computed: int


@dataclass(frozen=True)
class Measurement:
    """One run: seconds of the computation, tokens that went through the model (padding included)."""

    seconds: float
    tokens_computed: int
    peak_gpu_mb: float | None
    parts: dict[str, Part] = field(default_factory=dict)
    """By name, if the engine times them separately."""


class Engine(Protocol):
    """A contender with its model loaded."""

    def run(self) -> Measurement:
        """Compute the features of all train and validation prompts, and keep them."""

    def scores_N(self) -> np.ndarray:
        """Dot product of each train prompt's feature with the mean of all validation prompts', from the last run."""
