"""Base class of strategies, with the data that they read and the ranking that they return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field

from cropi.artifacts import OK, USABLE
from cropi.functional.ranking import ranks, reciprocal_rank_fusion
from cropi.seeds import unit_intervals
from cropi.setting_types import Table

CANDIDATES = ("candidates-a", "candidates-b")
"""Names of the two halves of a sample of the pool, which `learnalign` uses as directions."""

Need = Literal["trajectories", "gradients", "validation", "rewards", "representations"]
"""Input of a strategy: stored trajectories of the pool, per-prompt gradients, the validation sets, the rewards of
training so far, or the base policy's hidden states of the prompts."""


@dataclass(frozen=True)
class Candidates:
    """The training pool at the start of a stage, in ascending order of prompt id."""

    prompt_ids: Sequence[str]
    sources: Sequence[str]
    statuses: Sequence[str]
    pass_rates_N: Float[np.ndarray, " N"]  # mean rewards of the stored trajectories; NaN without a reward
    variances_N: Float[np.ndarray, " N"]  # of these rewards: p (1 - p) if they are 0 and 1; NaN without a reward
    training_variances: Mapping[str, float]  # of the newest training rewards, by prompt id
    influence: Mapping[str, Float[np.ndarray, " N"]]  # by direction; empty for strategies without gradients
    stage: int
    seed: int
    stages: int = 1  # of the run
    group_sizes_N: Int[np.ndarray, " N"] | None = None  # K of the stored trajectories; 0 for a prompt without any
    lengths_N: Float[np.ndarray, " N"] | None = None  # |g_i|; NaN if it was not computed
    texts: Sequence[str] = ()  # of the prompts
    validation_texts: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by validation set

    def __post_init__(self) -> None:
        if any(first >= second for first, second in pairwise(self.prompt_ids)):
            raise ValueError("prompt ids must be distinct and in ascending order: ties are broken by place")

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def usable_N(self) -> Bool[np.ndarray, " N"]:
        """Prompts that can be trained on: their gold answer is readable and they have trajectories."""
        return np.array([status in USABLE for status in self.statuses])

    @property
    def mixed_N(self) -> Bool[np.ndarray, " N"]:
        """Prompts with signal: their completions were not all rewarded alike."""
        return np.array([status == OK for status in self.statuses])

    def uniform_N(self, *purpose: str | int) -> Float[np.ndarray, " N"]:
        """Independent uniform numbers u(seed, purpose, prompt id) in [0, 1)."""
        return np.fromiter(unit_intervals(self.prompt_ids, self.seed, *purpose), dtype=np.float64, count=len(self))

    @property
    def rated_N(self) -> Bool[np.ndarray, " N"]:
        """Usable prompts whose pass rate measures difficulty.

        Excludes prompts whose completions all got the same grade between 0 and 1: their pass rate looks like signal,
        but their rewards do not vary.
        """
        p_N = self.pass_rates_N
        constant_N = (self.variances_N == 0) & (p_N > 0) & (p_N < 1)
        return self.usable_N & ~np.isnan(p_N) & ~constant_N


@dataclass(frozen=True)
class Ranking:
    """A strategy's answer: a score for every prompt (higher is better) and which prompts it may select."""

    scores_N: Float[np.ndarray, " N"]
    eligible_N: Bool[np.ndarray, " N"]
    reason: str
    set_ranks: Mapping[str, Int[np.ndarray, " N"]] = field(default_factory=dict)  # rank by validation set


class FusionConfig(Table):
    """Reciprocal Rank Fusion over validation sets: sum over sets of 1 / (kappa + rank)."""

    kappa: Annotated[float, Field(ge=0)] = 60.0
    """Larger values even out the head of the lists (60: Cormack et al. 2009; the paper's code: 0)."""
    truncate: bool = False
    """Rank only the first ceil(fraction N) of each list; others add nothing (the paper's code: true, with floor)."""


class StrategyTable(Table, ABC):
    """Settings of a strategy, and its ranking of the prompts.

    To add a strategy, write a subclass in a file of its own under `strategies/` and import it in
    `strategies/__init__.py`.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    reads_lengths: ClassVar[bool] = False  # needs the length of every prompt's gradient
    reads_texts: ClassVar[bool] = False  # ranks by the prompts' words
    takes_all: ClassVar[bool] = False  # trains on every eligible prompt instead of the best ceil(fraction N)
    chooses_online: ClassVar[bool] = False  # chooses every generation batch while training runs
    reads_influence: ClassVar[bool] = False  # in training's own backward passes, with directions of the validation sets
    represented_depth: ClassVar[float] = 1.0  # which hidden states it reads: 1 is the last layer's, 0 the embeddings
    candidates_aimed_at: ClassVar[int] = 0  # training prompts that replace the validation sets as directions

    type: str
    """Name of the strategy."""

    @abstractmethod
    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """Rank all candidates for a stage that trains on `size` prompts."""

    @property
    def collects(self) -> bool:
        """Whether the pool and the validation sets are sampled before training: it ranks by these trajectories."""
        return "trajectories" in self.needs

    @property
    def reads_representations(self) -> bool:
        """Whether it reads the base policy's hidden states of the prompts before training."""
        return "representations" in self.needs

    @property
    def reads_scores(self) -> bool:
        """Whether it needs `score`."""
        return "gradients" in self.needs

    def trained_groups(self, groups: int) -> int:
        """Return how many groups of a generation batch are trained on; the others are sampled only."""
        return groups

    @property
    def aims_at_validation(self) -> bool:
        """Whether its scores are inner products with gradients of the validation sets."""
        return self.reads_scores and not self.candidates_aimed_at

    def directions(self, validation_sets: Iterable[str]) -> list[str]:
        """Names of the directions that the pool's gradients are compared with, as in the columns of its scores."""
        return list(CANDIDATES) if self.candidates_aimed_at else sorted(validation_sets)

    def scored_stage(self, stage: int) -> int:
        """Return the stage whose scores are used at `stage`."""
        return stage


def gumbel_keys(
    candidates: Candidates, purpose: str, log_weights_N: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """Keys of a weighted draw without replacement: log w_i - log(-log u_i), u_i = u(seed, purpose, stage, i) uniform.

    The k largest keys are a draw of k prompts, one after the other, each with probability proportional to w among those
    left (Gumbel top-k: Vieira 2014; Kool et al., arXiv 1903.06059). Weights need not sum to 1; none may be zero.
    """
    uniform_N = candidates.uniform_N(purpose, candidates.stage)
    return log_weights_N - np.log(-np.log(np.maximum(uniform_N, 2.0**-64)))


def fused_ranking(
    values: Mapping[str, Float[np.ndarray, " N"]],
    eligible_N: Bool[np.ndarray, " N"],
    size: int,
    fusion: FusionConfig,
    reason: str,
) -> Ranking:
    """Fuse one score per validation set into one: s_i = sum_v 1 / (kappa + rank_v(i)) (RRF: Cormack et al. 2009).

    All prompts have a rank, eligible or not. With `truncate`, each list counts down to rank `size`.
    """
    set_ranks = {name: ranks(values_N) for name, values_N in values.items()}
    ranks_NV = np.stack(list(set_ranks.values()), axis=1)
    fused_N = reciprocal_rank_fusion(ranks_NV, kappa=fusion.kappa, depth=size if fusion.truncate else None)
    return Ranking(fused_N, eligible_N, reason, set_ranks)
