"""Several scores of a prompt, one for each validation set, become one."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float

from cropi.config import SelectConfig
from cropi.curriculum.candidates import Candidates, Ranking
from cropi.functional.ranking import ranks, reciprocal_rank_fusion, selection_size


def fuse(
    candidates: Candidates,
    values: Mapping[str, Float[np.ndarray, " N"]],
    eligible_N: Bool[np.ndarray, " N"],
    config: SelectConfig,
    reason: str,
) -> Ranking:
    """s_i = sum_v 1 / (kappa + rank_v(i)), rank_v by the values for validation set v (RRF: Cormack et al. 2009).

    All prompts have a rank, eligible or not. With `truncate`, a list of N counts down to rank ceil(fraction N).
    """
    set_ranks = {name: ranks(values_N) for name, values_N in values.items()}
    depth = selection_size(config.fraction, len(candidates)) if config.fusion.truncate else None
    ranks_NV = np.stack(list(set_ranks.values()), axis=1)
    fused_N = reciprocal_rank_fusion(ranks_NV, kappa=config.fusion.kappa, depth=depth)
    return Ranking(fused_N, eligible_N, reason, set_ranks)
