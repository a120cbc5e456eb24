"""Every prompt."""

import numpy as np

from cropi.artifacts import GOLD_UNPARSEABLE
from cropi.selection.candidates import Candidates, Ranking


def full(candidates: Candidates) -> Ranking:
    """s_i = 1 for every prompt whose answer can be read: plain GRPO on the whole pool."""
    eligible_N = np.array([status != GOLD_UNPARSEABLE for status in candidates.statuses])
    return Ranking(np.ones(len(candidates)), eligible_N, "the whole pool", {})
