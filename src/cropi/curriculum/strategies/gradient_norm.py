"""The longest gradients."""

import numpy as np

from cropi.artifacts import OK
from cropi.config import GradientNormStrategy, SelectConfig
from cropi.curriculum.candidates import Candidates, Ranking


def gradient_norm(candidates: Candidates, strategy: GradientNormStrategy, config: SelectConfig) -> Ranking:
    """s_i = |g_i|, the length of the prompt's off-policy gradient at this stage, or of its feature under `sketch`.

    Importance by gradient norm (Katharopoulos & Fleuret, arXiv 1803.00942), a baseline of GradAlign. It needs no
    validation set; the pass that computes it meets the validation directions all the same, and is charged as that of
    `influence`.
    """
    assert candidates.lengths_N is not None
    with_signal_N = np.array([status == OK for status in candidates.statuses])
    lengths_N = np.nan_to_num(candidates.lengths_N)  # not finite: the prompt's own numbers are not
    return Ranking(lengths_N, with_signal_N & (lengths_N > 0), "its gradient is long", {})
