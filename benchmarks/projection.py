"""What a projection loses: precision@10 % and rank correlation of sketched influence against exact influence.

Groups are real: the built-in policy's own completions, families in turn. Exact and sketched influence come from the
same engine on the same groups, so the projection is the only difference; every variant is drawn with several seeds, and
each seed gives one value per validation set.

    python benchmarks/projection.py --prompts 1000 --seeds 3 --out research/figures/projection.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cropi.builtin import FAMILIES
from cropi.config import PolicyConfig
from cropi.console import progress
from cropi.functional.projection import SparseProjection
from cropi.gradients.groups import SurrogateSettings
from cropi.gradients.influence_scorer import Scorer, ScorerOptions
from cropi.lab.audit.agreement import spearman, top_overlap
from cropi.lab.bench.machine import describe
from cropi.lab.bench.workload import mixed_groups
from cropi.policy import load_policy

TARGETS = ("sum", "machine", "horner", "shell")  # one validation set each
SETTINGS = SurrogateSettings("constant", 32)

VARIANTS: list[dict[str, Any]] = [
    *({"mask": "uniform", "keep_fraction": keep} for keep in (1.0, 0.3, 0.1, 0.03, 0.01)),
    *({"mask": "structured", "keep_fraction": 0.1, "rank": rank} for rank in (0, 1, 4, 8)),
    *({"mask": "structured", "keep_fraction": keep} for keep in (0.03, 0.01)),
    *({"mask": "structured", "keep_fraction": 0.1, "dim": dim} for dim in (2048, 8192, 131072)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--validation", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train = list(mixed_groups(sorted(FAMILIES), "train", options.prompts, 0))
    validation = {name: list(mixed_groups([name], "validation", options.validation, 0)) for name in TARGETS}
    model = load_policy(PolicyConfig(path="builtin")).model
    exact = _influence(Scorer(model, SETTINGS, ScorerOptions(estimator="exact")), train, validation)
    rows = []
    with progress("projections", len(VARIANTS) * options.seeds, "draws") as bar:
        for variant in VARIANTS:
            found = []
            for seed in range(options.seeds):
                projection = SparseProjection(**variant, seed=seed)
                scorer = Scorer(model, SETTINGS, ScorerOptions(estimator="sketch", projection=projection))
                found.append(_influence(scorer, train, validation))
                bar.advance()
            rows.append(variant | _quality(found, exact))
    _print(rows, options)
    if options.out:
        result = {"environment": describe("cpu", 1), "options": {**vars(options), "out": None}, "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _influence(scorer: Scorer, train: list[Any], validation: dict[str, Any]) -> np.ndarray:
    scorer.aim(validation)
    return np.concatenate([scorer(train[start : start + 256]).products_NV for start in range(0, len(train), 256)])


def _quality(found: list[np.ndarray], exact_NV: np.ndarray) -> dict[str, Any]:
    """Over seeds and validation sets: mean and worst precision@10 %, mean and worst rank correlation."""
    pairs = [(estimate[:, v], exact_NV[:, v]) for estimate in found for v in range(exact_NV.shape[1])]
    precisions = [top_overlap(estimate, true, 0.1) for estimate, true in pairs]
    correlations = [spearman(estimate, true) for estimate, true in pairs]
    return {
        "precision_mean": statistics.mean(precisions),
        "precision_worst": min(precisions),
        "spearman_mean": statistics.mean(correlations),
        "spearman_worst": min(correlations),
    }


def _print(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(f"\n{options.prompts} groups, {len(TARGETS)} validation sets, {options.seeds} seeds\n")
    print("| mask | kept | rank | D | precision@10 %, mean (worst) | Spearman, mean (worst) |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        full = SparseProjection(**{key: row[key] for key in row if not key.startswith(("precision", "spearman"))})
        structured = full.mask == "structured"
        print(
            f"| {full.mask} | {full.keep_fraction:g} | {full.rank if structured else '–'} | "
            f"{full.dim} | "
            f"{row['precision_mean']:.3f} ({row['precision_worst']:.3f}) | "
            f"{row['spearman_mean']:.4f} ({row['spearman_worst']:.4f}) |"
        )


if __name__ == "__main__":
    main()
