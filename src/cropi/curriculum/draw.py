"""Weighted draws without replacement."""

import numpy as np
from jaxtyping import Float

from cropi.curriculum.candidates import Candidates
from cropi.seeds import unit_interval


def gumbel_keys(
    candidates: Candidates, purpose: str, log_weights_N: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """log w_i - log(-log u_i) with uniform u_i = u(seed, purpose, stage, i).

    The k largest keys are a draw of k prompts, one after the other, each with probability proportional to w among those
    left (Gumbel top-k: Vieira 2014; Kool et al., arXiv 1903.06059). Weights need no sum, and none may be zero.
    """
    uniform_N = np.array([unit_interval(candidates.seed, purpose, candidates.stage, i) for i in candidates.prompt_ids])
    return log_weights_N - np.log(-np.log(np.maximum(uniform_N, 2.0**-64)))
