"""Every prompt."""

import numpy as np

from cropi.selection.candidates import Candidates, Ranking


def full(candidates: Candidates) -> Ranking:
    """s_i = 1 for every usable prompt: plain GRPO on the whole pool."""
    return Ranking(np.ones(len(candidates)), candidates.usable_N, "the whole pool", {})
