"""CROPI: influence on the validation sets, fused."""

import numpy as np

from cropi.artifacts import OK
from cropi.config import FusionConfig
from cropi.functional.fusion import ranks, reciprocal_rank_fusion
from cropi.functional.sampling import places
from cropi.selection.candidates import Candidates, Ranking


def influence(candidates: Candidates, fusion: FusionConfig, fraction: float) -> Ranking:
    """s_i = sum_v 1 / (kappa + rank_v(i)), rank_v by influence on validation set v (paper: POPI scores fused by RRF).

    Only prompts with signal can be chosen: the others have a zero gradient, hence no influence either way. With
    `truncate`, a list counts down to rank ceil(fraction N), N the prompts with signal or not.
    """
    set_ranks = {name: ranks(values_N, candidates.prompt_ids) for name, values_N in candidates.influence.items()}
    depth = places(fraction, len(candidates)) if fusion.truncate else None
    fused_N = reciprocal_rank_fusion(np.stack(list(set_ranks.values()), axis=1), kappa=fusion.kappa, depth=depth)
    eligible_N = np.array([status == OK for status in candidates.statuses])
    return Ranking(fused_N, eligible_N, "influence", set_ranks)
