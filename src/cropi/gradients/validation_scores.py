"""Influence of the validation prompts themselves, as evidence about similar training prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cropi.gradients.groups import Group
from cropi.gradients.influence_scorer import Scored, Scorer
from cropi.gradients.score_reliability import concatenated, score_by_halves
from cropi.parallel import process_group

PIECE = 16  # groups scored together by one process


def score_validation_prompts(
    scorer: Scorer,
    validation: Mapping[str, Sequence[Group]],
    advance: Callable[[int], None] | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """Score validation prompts; return rows of the validation score table, and the tokens computed.

    A validation prompt's gradient is part of its own set's direction d_v = 1/M sum_m g_m. Its influence on the other
    prompts is <g_j, (M d_v - g_j) / (M - 1)>, zero if it is the only prompt. The standard error is that of <g_j, d_v>,
    times M / (M - 1). For `dot` and plain means. The ranks divide the groups.
    """
    names, rows, computed = list(validation), [], 0
    by_set = _scored(scorer, validation, advance)
    for own, (name, groups) in enumerate(validation.items()):
        scored = by_set[name]
        assert scored.errors_NV is not None
        computed += scored.tokens_computed
        count = len(groups)
        products_NV, errors_NV = scored.products_NV.copy(), scored.errors_NV.copy()
        alone = (products_NV[:, own] * count - scored.norms_N**2) / max(count - 1, 1)
        products_NV[:, own] = alone if count > 1 else 0.0
        errors_NV[:, own] *= count / max(count - 1, 1)
        for row, group in enumerate(groups):
            entry: dict[str, Any] = {"prompt_id": group.prompt_id, "set": name}
            entry |= {"pass_rate": group.pass_rate, "reward_variance": group.variance}
            entry["trajectories"] = len(group.completions)
            for v, column in enumerate(names):
                entry[f"influence/{column}"] = float(products_NV[row, v])
                error = float(errors_NV[row, v])
                entry[f"standard_error/{column}"] = error if np.isfinite(error) else None
            rows.append(entry)
    return rows, computed


def _scored(
    scorer: Scorer,
    validation: Mapping[str, Sequence[Group]],
    advance: Callable[[int], None] | None,
) -> dict[str, Scored]:
    """Score every set piece by piece, each piece by one process."""
    ranks = process_group()
    pieces = [(name, start) for name, groups in validation.items() for start in range(0, len(groups), PIECE)]
    with scorer.lockstep():
        own = {
            (name, start): concatenated([score_by_halves(scorer, validation[name][start : start + PIECE], advance)])
            for name, start in ranks.share(pieces)
        }
    found = {piece: scored for part in ranks.gather(own) for piece, scored in part.items()}
    return {name: concatenated([found[piece] for piece in pieces if piece[0] == name]) for name in validation}
