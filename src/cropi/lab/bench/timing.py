"""Statistics of rounds: medians, ratios within rounds, and agreement of a ranking with the exact one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cropi.lab.audit.agreement import spearman, top_overlap
from cropi.lab.bench.worker_rounds import Record

PRECISION_SHARE = 0.1


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median and range; None where nothing was measured."""
    return {"median": float(np.median(values)), "low": min(values), "high": max(values)} if values else None


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float] | None:
    """Spread of ours_r / theirs_r over the rounds r of both, so that a machine that is slow for a while slows both."""
    return spread([a / b for a, b in zip(ours, theirs, strict=False)])


def quality(scores_N: np.ndarray | None, exact_N: np.ndarray | None, signal_N: np.ndarray) -> dict[str, float | None]:
    """Agreement with the exact scores over the prompts with signal: the others are 0 for everybody."""
    if scores_N is None or exact_N is None or signal_N.sum() < 2:
        return {"spearman": None, "precision_at_10": None}
    found_N, true_N = scores_N[signal_N], exact_N[signal_N]
    correlation = spearman(found_N, true_N)
    return {
        "spearman": None if math.isnan(correlation) else correlation,
        "precision_at_10": top_overlap(found_N, true_N, PRECISION_SHARE),
    }


def per_token(record: Record) -> list[float]:
    """Seconds per computed token of each round: of the train pass if it has its own time."""
    timed = [answer["parts"].get("train", answer) for answer in record.rounds]
    return [part["seconds"] / part["tokens_computed"] for part in timed]


def seconds(record: Record) -> list[float]:
    """Seconds of each round."""
    return [answer["seconds"] for answer in record.rounds]


def rates(record: Record, tokens_given: int) -> dict[str, Any]:
    """Speed and memory of one contender."""
    given = [tokens_given / answer["seconds"] for answer in record.rounds]
    computed = [answer["tokens_computed"] / answer["seconds"] for answer in record.rounds]
    parts = sorted({name for answer in record.rounds for name in answer["parts"]})
    return {
        "seconds": spread(seconds(record)),
        "parts": {
            name: {
                "seconds": spread([answer["parts"][name]["seconds"] for answer in record.rounds]),
                "tokens_computed": record.rounds[-1]["parts"][name]["tokens_computed"],
            }
            for name in parts
        },
        "tokens_given": tokens_given,
        "tokens_computed": record.rounds[-1]["tokens_computed"] if record.rounds else None,
        "given_per_s": spread(given),
        "computed_per_s": spread(computed),
        "peak_rss_mb": max((answer["peak_rss_mb"] for answer in record.rounds), default=None),
        "peak_gpu_mb": max((answer["peak_gpu_mb"] or 0.0 for answer in record.rounds), default=0.0) or None,
    }
