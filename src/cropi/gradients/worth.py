"""What a table of scores is worth: reliability, probabilities of being among the best, drift since sampling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cropi.artifacts import OK
from cropi.config import Config
from cropi.functional.fusion import ranks, reciprocal_rank_fusion
from cropi.functional.reliability import reliability, shrunk, top_probabilities
from cropi.functional.sampling import places
from cropi.seeds import derived_seed


def note_reliability(
    config: Config, rows: Mapping[str, dict[str, Any]], names: list[str], stage: int
) -> dict[str, Any] | None:
    """Enter every prompt's probability of being among the best, and say what the ranking is worth.

    Per validation set: `reliability` of the influence; over all: `expected_overlap`, the share of a plain selection of
    the best that is expected to belong there, and what chance would give.
    """
    ok = [row for row in rows.values() if row["status"] == OK]
    settings, size = config.select, places(config.select.fraction, len(rows))
    estimates = {name: np.array([row[f"influence/{name}"] for row in ok]) for name in names}
    errors = {name: np.array([row[f"standard_error/{name}"] for row in ok], dtype=np.float64) for name in names}
    if any(np.isnan(errors[name]).all() for name in names):
        return None  # groups of two trajectories have no error
    depth = size if settings.fusion.truncate else None
    chances_N = top_probabilities(
        [shrunk(estimates[name], errors[name]) for name in names],
        size,
        kappa=settings.fusion.kappa,
        depth=depth,
        seed=derived_seed(config.seed, "reliability", stage),
    )
    for row in rows.values():
        row["top_probability"] = 0.0
    for row, chance in zip(ok, chances_N.tolist(), strict=True):
        row["top_probability"] = chance
    ranks_NV = np.stack([ranks(estimates[name], [row["prompt_id"] for row in ok]) for name in names], axis=1)
    best = np.argsort(-reciprocal_rank_fusion(ranks_NV, kappa=settings.fusion.kappa, depth=depth), kind="stable")[:size]
    return {
        "reliability": {name: reliability(estimates[name], errors[name]) for name in names},
        "expected_overlap": float(chances_N[best].mean()),
        "chance": min(1.0, size / len(ok)),
    }


def drift(rows: Iterable[Mapping[str, Any]]) -> dict[str, float] | None:
    """How far the policy is from the one that sampled: medians over prompts with signal of the effective sample share,
    and means of the clip share and of the divergence per token. None where no prompt has them."""
    known = [row for row in rows if None not in (row["ratio_ess"], row["clip_share"], row["kl"])]
    if not known:
        return None
    return {
        "ratio_ess": float(np.median([row["ratio_ess"] for row in known])),
        "clip_share": float(np.mean([row["clip_share"] for row in known])),
        "kl": float(np.mean([row["kl"] for row in known])),
    }
