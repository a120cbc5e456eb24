"""Weights of a prompt's off-policy surrogate: A_k / Z_k of each trajectory, and statistics of the importance ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from operator import add

import numpy as np
import torch
from torch import Tensor

from cropi.artifacts import CLIP_RANGE
from cropi.config import Config
from cropi.functional.surrogate import NORMALIZER_OF_LOSS, Normalizer, group_advantages, normalizers
from cropi.gradients.groups import Group
from cropi.gradients.packing import Span

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
