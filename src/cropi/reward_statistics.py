"""Per-prompt reward statistics shared between stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cropi.functional.influence_formulas import reward_variance


class GroupFacts(NamedTuple):
    """Reward statistics of a prompt's stored trajectories; NaN without rewards."""

    status: str
    pass_rate: float  # mean reward
    variance: float  # of the rewards


class Visit(NamedTuple):
    """A prompt in a generation batch of training."""

    step: int  # the optimiser step under way, from 0
    prompt_id: str
    mean_reward: float
    tries: int  # completions with a reward
    variance: float  # of the rewards


def visit(step: int, prompt_id: str, rewards: Sequence[float]) -> Visit:
    """Summarise one or more rewards of a prompt."""
    variance = float(reward_variance(np.array(rewards, dtype=np.float64)))
    return Visit(step, prompt_id, sum(rewards) / len(rewards), len(rewards), variance)
