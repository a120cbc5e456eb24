"""What the surrogate of a group is made of: settings, and the factor A_k / Z_k of each trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cropi.config import Config
from cropi.functional.advantages import group_advantages
from cropi.functional.surrogate import NORMALIZER_OF_LOSS, Correction, Normalizer, normalizers
from cropi.gradients.groups import Group

Baseline = Literal["group", "reweighted"]


@dataclass(frozen=True)
class SurrogateSettings:
    """What the off-policy surrogate of a prompt is made of."""

    normalizer: Normalizer
    max_completion_length: int
    temperature: float = 1.0
    advantage_std: bool = True
    correction: Correction = "token"
    """What multiplies a token's gradient: see `cropi.functional.surrogate.corrected_ratios`."""
    clip: float = 0.2
    """Epsilon of `clipped`, and of the share of ratios that is reported as outside."""
    prefix_cap: float = 10.0
    """Largest product of ratios that `prefix` uses."""
    baseline: Baseline = "group"
    """Mean and deviation that advantages are taken against: the group's, or weighted by exp(mean_t log rho)."""


def surrogate_settings(config: Config, loss_type: str, scale_rewards: str | bool) -> SurrogateSettings:
    """Settings of the surrogate, from a run's config and its trainer's loss.

    Rewards scaled by the deviation of the whole batch share that divisor, which ranks like no scaling.
    """
    normalizer, std = config.score.normalizer, config.score.advantage_std
    return SurrogateSettings(
        normalizer=NORMALIZER_OF_LOSS[loss_type] if normalizer == "auto" else normalizer,
        max_completion_length=config.collect.max_completion_length,
        temperature=config.collect.temperature,
        advantage_std=scale_rewards in {"group", True} if std == "auto" else std,
        correction=config.score.correction,
        clip=config.score.clip,
        prefix_cap=config.score.prefix_cap,
        baseline=config.score.baseline,
    )


def trajectory_scales(
    group: Group, settings: SurrogateSettings, mean_log_ratios: Sequence[float] | None = None
) -> list[float]:
    """A_k / Z_k of each trajectory, by which the gradient of sum_t rho_{k,t} enters the group's (paper eq. 4).

    A trajectory with a scale of 0 or without a token adds nothing and need not be computed. The re-weighted baseline
    needs each trajectory's mean log ratio; ValueError without.
    """
    lengths_K = np.array([len(completion) for completion in group.completions])
    return scales_of(np.array(group.rewards, dtype=np.float64), lengths_K, settings, mean_log_ratios).tolist()


def scales_of(
    rewards_XK: np.ndarray,
    lengths_XK: np.ndarray,
    settings: SurrogateSettings,
    mean_log_ratios_XK: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """A_k / Z_k (X, K) from rewards and lengths; leading dimensions are groups."""
    weights_XK = None
    if settings.baseline == "reweighted":
        if mean_log_ratios_XK is None:
            raise ValueError("the re-weighted baseline needs each trajectory's mean log ratio")
        logs_XK = np.asarray(mean_log_ratios_XK)
        weights_XK = np.exp(logs_XK - logs_XK.max(axis=-1, keepdims=True))
    advantages_XK = group_advantages(rewards_XK, std=settings.advantage_std, weights_XK=weights_XK)
    return advantages_XK / normalizers(lengths_XK, settings.normalizer, settings.max_completion_length)
