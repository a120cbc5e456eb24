"""CROPI: influence on the validation sets, fused."""

import numpy as np

from cropi.artifacts import OK
from cropi.config import InfluenceStrategy, SelectConfig
from cropi.curriculum.candidates import Candidates, Ranking
from cropi.curriculum.fuse import fuse
from cropi.seeds import unit_intervals


def influence(candidates: Candidates, strategy: InfluenceStrategy, config: SelectConfig) -> Ranking:
    """s_i = sum_v 1 / (kappa + rank_v(i)), rank_v by influence on validation set v (paper: POPI scores fused by RRF).

    Only prompts with signal can be chosen: the others have a zero gradient, hence no influence either way.

    Negative controls, with the same prompts to choose from: `bottom` ranks by -influence, so it takes those that point
    most away from the validation sets (GradAlign's `negsim`); `shuffled` hands the influence of the prompts with signal
    round among them at random, for all sets in the same way and anew at each stage: chance among the same prompts.
    """
    eligible_N = np.array([status == OK for status in candidates.statuses])
    values = dict(candidates.influence)
    if strategy.order == "bottom":
        values = {name: -values_N for name, values_N in values.items()}
    elif strategy.order == "shuffled":
        values = {name: _shuffled(candidates, values_N, eligible_N) for name, values_N in values.items()}
    reason = {"top": "influence", "bottom": "least influence", "shuffled": "shuffled influence"}[strategy.order]
    return fuse(candidates, values, eligible_N, config, reason)


def _shuffled(candidates: Candidates, values_N: np.ndarray, eligible_N: np.ndarray) -> np.ndarray:
    rows = np.flatnonzero(eligible_N).tolist()
    names = (candidates.prompt_ids[row] for row in rows)
    draws = unit_intervals(names, candidates.seed, "shuffle", candidates.stage)
    shuffled_N = values_N.copy()
    shuffled_N[rows] = values_N[rows][np.argsort(list(draws), kind="stable")]
    return shuffled_N
