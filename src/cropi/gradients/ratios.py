"""What is known of importance ratios: how far the current policy has moved from the one that sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cropi.gradients.packing import Span

FACTS = ("ratio_ess", "clip_share", "kl")
"""Columns of score tables."""


@dataclass(frozen=True)
class RatioMoments:
    """Sums over the tokens of some trajectories, of which all that is known of their importance ratios is made."""

    tokens: int = 0
    ratios: float = 0.0
    squares: float = 0.0
    outside: float = 0.0
    """Tokens whose ratio is outside [1 - clip, 1 + clip]."""
    divergence: float = 0.0
    """sum rho log rho - rho + 1."""
    logs: float = 0.0

    def __add__(self, other: RatioMoments) -> RatioMoments:
        return RatioMoments(
            self.tokens + other.tokens,
            self.ratios + other.ratios,
            self.squares + other.squares,
            self.outside + other.outside,
            self.divergence + other.divergence,
            self.logs + other.logs,
        )

    @property
    def effective_share(self) -> float:
        """(sum rho)^2 / (T sum rho^2) (Kish 1965).

        1 where nothing was computed, 0 where all ratios vanish, NaN where their squares are beyond float64.
        """
        if not self.tokens:
            return 1.0
        if math.isinf(self.squares):
            return math.nan
        return (self.ratios / self.squares) * (self.ratios / self.tokens) if self.squares else 0.0

    @property
    def clip_share(self) -> float:
        """Share of the tokens whose ratio is outside the clip range; 0 where nothing was computed."""
        return self.outside / self.tokens if self.tokens else 0.0

    @property
    def kl(self) -> float:
        """KL(pi || beta) per token, in nats, at the prefixes of beta: the mean of rho log rho - rho + 1, each of which
        is at least 0 and whose expectation under beta is the divergence (Schulman 2020). 0 where nothing was computed.
        """
        return self.divergence / self.tokens if self.tokens else 0.0

    @property
    def mean_log(self) -> float:
        """Mean log rho: the length-normalised log ratio of a trajectory."""
        return self.logs / self.tokens if self.tokens else 0.0

    @property
    def facts(self) -> tuple[float, float, float]:
        """In the order of `FACTS`."""
        return self.effective_share, self.clip_share, self.kl


def moments(log_ratios_E: Tensor, spans: Sequence[Span], clip: float) -> list[RatioMoments]:
    """Of the stretches of a tensor of log ratios, float64."""
    ratios_E = log_ratios_E.exp()
    outside_E = (ratios_E - 1).abs() > clip
    divergence_E = torch.where(ratios_E == 0, 1.0, ratios_E * log_ratios_E - ratios_E + 1)
    all_5E = torch.stack([ratios_E, ratios_E * ratios_E, outside_E.double(), divergence_E, log_ratios_E])
    sums = torch.stack([all_5E[:, span.start : span.stop].sum(dim=1) for span in spans]).tolist()
    return [RatioMoments(span.stop - span.start, *row) for span, row in zip(spans, sums, strict=True)]
