"""A group: the K trajectories of one prompt, and its off-policy surrogate, A_k / Z_k with the importance ratios."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import groupby
from operator import add
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from cropi.artifacts import CLIP_RANGE, GOLD_UNPARSEABLE, NO_SIGNAL, OK
from cropi.config import Config
from cropi.functional.influence_formulas import reward_variance
from cropi.functional.surrogate import NORMALIZER_OF_LOSS, Normalizer, group_advantages, normalizers
from cropi.gradients.packing import Span


@dataclass(frozen=True)
class Group:
    """Token ids, rewards and behaviour log-probs of a prompt's K completions.

    A completion includes its end-of-sequence token if it has one; every completion token counts. An empty completion
    counts in the advantages but has no weight, like one masked by the trainer's loss. Behaviour log-probs of None mean
    on-policy trajectories: every importance ratio is 1.
    """

    prompt_id: str
    prompt_ids: list[int]
    completions: list[list[int]]
    rewards: list[float]
    behaviour_logprobs: list[list[float]] | None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(f"prompt {self.prompt_id}: the prompt has no token")
        if len(self.completions) != len(self.rewards):
            raise ValueError(
                f"prompt {self.prompt_id}: {len(self.completions)} completions, {len(self.rewards)} rewards"
            )
        logprobs = self.behaviour_logprobs
        if logprobs is not None and [len(row) for row in logprobs] != [len(row) for row in self.completions]:
            raise ValueError(f"prompt {self.prompt_id}: behaviour log-probs and completions differ in length")

    @property
    def status(self) -> str:
        """`ok` if the rewards differ and a completion has a token; `no_signal` if the gradient is zero."""
        mixed = any(reward != self.rewards[0] for reward in self.rewards) and any(self.completions)
        return OK if mixed else NO_SIGNAL

    @property
    def pass_rate(self) -> float:
        """Mean reward."""
        return sum(self.rewards) / len(self.rewards) if self.rewards else float("nan")

    @property
    def variance(self) -> float:
        """Variance of the rewards: p (1 - p) if they are 0 and 1."""
        return float(reward_variance(np.array(self.rewards, dtype=np.float64)))

    @property
    def completion_tokens(self) -> int:
        return sum(len(completion) for completion in self.completions)


class GroupFacts(NamedTuple):
    """Reward statistics of a prompt's stored trajectories; NaN without rewards."""

    status: str
    pass_rate: float  # mean reward
    variance: float  # of the rewards
    size: int = 0  # trajectories with a reward


def group_facts(table: pa.Table) -> dict[str, GroupFacts]:
    """Return status, pass rate and variance of every group of one set's trajectories, by prompt id."""
    unreadable = GroupFacts(GOLD_UNPARSEABLE, math.nan, math.nan)
    return {
        prompt_id: unreadable
        if group is None
        else GroupFacts(group.status, group.pass_rate, group.variance, len(group.rewards))
        for prompt_id, group in iterate_groups(table)
    }


_COLUMNS = ["prompt_id", "sample", "prompt_ids", "completion_ids", "behaviour_logprobs", "reward", "status"]
_ROWS_AT_ONCE = 4096


def iterate_groups(table: pa.Table) -> Iterator[tuple[str, Group | None]]:
    """Yield (prompt id, group) of one set's trajectories by ascending prompt id, a few thousand rows at a time.

    The group is None if the gold answer cannot be read (status `gold_unparseable`), because then there are no rewards.
    """
    order = pc.sort_indices(
        table.select(["prompt_id", "sample"]), sort_keys=[("prompt_id", "ascending"), ("sample", "ascending")]
    )
    for prompt_id, rows in groupby(_rows(table.select(_COLUMNS), order), lambda row: row["prompt_id"]):
        yield prompt_id, _group(prompt_id, list(rows))


def _rows(table: pa.Table, order: pa.Array) -> Iterator[dict[str, Any]]:
    for start in range(0, len(order), _ROWS_AT_ONCE):
        yield from table.take(order.slice(start, _ROWS_AT_ONCE)).to_pylist()


def _group(prompt_id: str, rows: list[Mapping[str, Any]]) -> Group | None:
    if any(row["status"] == GOLD_UNPARSEABLE for row in rows):
        return None
    logprobs = [row["behaviour_logprobs"] for row in rows]
    return Group(
        prompt_id,
        rows[0]["prompt_ids"],
        [row["completion_ids"] for row in rows],
        [row["reward"] for row in rows],
        None if logprobs[0] is None else logprobs,  # collected for the policy that sampled them: ratio 1
    )


RATIO_COLUMNS = ("ratio_ess", "clip_share", "kl")  # columns of score tables


@dataclass(frozen=True)
class SurrogateSettings:
    """Settings of the off-policy surrogate of a prompt. Raises ValueError for `constant` without a length."""

    normalizer: Normalizer = "sequence"
    """Z_k, see `cropi.functional.surrogate.normalizers`."""
    max_completion_length: int = 0
    """Longest completion in tokens; only `constant` needs it."""
    temperature: float = 1.0
    """The one that the trajectories were sampled with."""
    advantage_std: bool = True
    """Divide advantages by the group's standard deviation (GRPO) or not (Dr. GRPO)."""

    def __post_init__(self) -> None:
        if self.normalizer == "constant" and self.max_completion_length < 1:
            raise ValueError("normalizer='constant' needs max_completion_length, in tokens")


def surrogate_settings(config: Config, loss_type: str, scale_rewards: str | bool) -> SurrogateSettings:
    """Make the settings of the surrogate from a run's config and its trainer's loss.

    Rewards scaled by the deviation of the whole batch share that divisor, which ranks like no scaling.
    """
    normalizer, std = config.score.normalizer, config.score.advantage_std
    return SurrogateSettings(
        normalizer=NORMALIZER_OF_LOSS[loss_type] if normalizer == "auto" else normalizer,
        max_completion_length=config.collect.max_completion_length,
        temperature=config.collect.temperature,
        advantage_std=scale_rewards in {"group", True} if std == "auto" else std,
    )


def trajectory_scales(group: Group, settings: SurrogateSettings) -> list[float]:
    """A_k / Z_k of each trajectory, the weight of the gradient of sum_t rho_{k,t} in the group's (paper eq. 4).

    A trajectory with a scale of 0, or without a token, adds nothing and need not be computed.
    """
    lengths_K = np.array([len(completion) for completion in group.completions])
    return scales_of(np.array(group.rewards, dtype=np.float64), lengths_K, settings).tolist()


def scales_of(rewards_XK: np.ndarray, lengths_XK: np.ndarray, settings: SurrogateSettings) -> np.ndarray:
    """A_k / Z_k (X, K) from rewards and lengths; leading dimensions are groups."""
    advantages_XK = group_advantages(rewards_XK, std=settings.advantage_std)
    return advantages_XK / normalizers(lengths_XK, settings.normalizer, settings.max_completion_length)


@dataclass(frozen=True)
class RatioStatistics:
    """Sums over the tokens of some trajectories. They tell how far the policy has moved from the one that sampled."""

    tokens: int = 0
    ratios: float = 0.0
    squares: float = 0.0
    outside: float = 0.0  # tokens whose ratio is outside 1 +- `CLIP_RANGE`
    divergence: float = 0.0  # sum rho log rho - rho + 1

    def __add__(self, other: RatioStatistics) -> RatioStatistics:
        return RatioStatistics(*map(add, astuple(self), astuple(other)))

    @property
    def effective_share(self) -> float:
        """(sum rho)^2 / (T sum rho^2) (Kish 1965).

        1 if nothing was computed, 0 if all ratios vanish, NaN if their squares overflow float64.
        """
        if not self.tokens:
            return 1.0
        if math.isinf(self.squares):
            return math.nan
        return (self.ratios / self.squares) * (self.ratios / self.tokens) if self.squares else 0.0

    @property
    def clip_share(self) -> float:
        """Share of the tokens whose ratio is outside 1 +- `CLIP_RANGE`; 0 if nothing was computed."""
        return self.outside / self.tokens if self.tokens else 0.0

    @property
    def kl(self) -> float:
        """KL(pi || beta) per token in nats, at prefixes sampled from beta; 0 if nothing was computed.

        The mean of rho log rho - rho + 1: each term is at least 0, and its expectation under beta is the divergence
        (Schulman 2020).
        """
        return self.divergence / self.tokens if self.tokens else 0.0

    @property
    def columns(self) -> tuple[float, float, float]:
        """Values in the order of `RATIO_COLUMNS`."""
        return self.effective_share, self.clip_share, self.kl


def ratio_statistics(log_ratios_E: Tensor, spans: Sequence[Span]) -> list[RatioStatistics]:
    """Statistics of each span of a tensor of log ratios, float64."""
    ratios_E = log_ratios_E.exp()
    outside_E = (ratios_E - 1).abs() > CLIP_RANGE
    divergence_E = torch.where(ratios_E == 0, 1.0, ratios_E * log_ratios_E - ratios_E + 1)
    all_4E = torch.stack([ratios_E, ratios_E * ratios_E, outside_E.double(), divergence_E])
    sums = torch.stack([all_4E[:, span.start : span.stop].sum(dim=1) for span in spans]).tolist()
    return [RatioStatistics(span.stop - span.start, *row) for span, row in zip(spans, sums, strict=True)]
