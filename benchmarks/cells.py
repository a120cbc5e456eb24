"""What gathering observed prompts in fewer places does to the choice by pooled influence.

    python benchmarks/cells.py --seeds 0,1,2

A simulated pool: kinds at random places, a tenth of them useful, prompts in their kind's place or spread around it, of
which 13 % are observed with the noise of a few trajectories, judged with as many places as these and with fewer.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict

import numpy as np

from cropi.functional import pooling
from cropi.functional.agreement import top_overlap
from cropi.functional.pooling import Observed, pooled_slopes, principal_points, trust_of

KINDS, NUMBERS, SHARE, CHOSEN = 400, 64, 0.13, 0.1
PARTS = (1, 2, 8, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=60_000)
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    print("| prompts of a kind | observed for one place | correlation of slopes | best tenth shared | its true slope |")
    print("|---|---|---|---|---|")
    for label, spread in (("spread out", 0.6), ("in one place", 0.0)):
        rows = defaultdict(list)
        for seed in options.seeds.split(","):
            for part, *row in judged(options.prompts, spread, int(seed)):
                rows[part].append(row)
        for part, found in rows.items():
            columns = [f"{statistics.mean(c):.4f} ({min(c):.4f}–{max(c):.4f})" for c in zip(*found, strict=True)]
            print(f"| {label} | {part} | " + " | ".join(columns) + " |")


def judged(prompts: int, spread: float, seed: int) -> list[tuple[int, float, float, float]]:
    """By part: correlation with the slopes of all places, share of their best tenth, its true slope."""
    generator = np.random.default_rng(seed)
    kind_N = generator.integers(KINDS, size=prompts)
    place_N = generator.normal(size=(KINDS, NUMBERS))[kind_N] + spread * generator.normal(size=(prompts, NUMBERS))
    useful_K = (np.arange(KINDS) < KINDS * CHOSEN) + 0.2 * generator.normal(size=KINDS)
    slope_N = useful_K[kind_N] + 0.3 * generator.normal(size=prompts)
    strength_N = generator.uniform(0.05, 0.25, prompts)
    seen_S = np.flatnonzero(generator.random(prompts) < SHARE)
    influence_S = strength_N[seen_S] * slope_N[seen_S] + 0.3 * generator.normal(size=len(seen_S))
    points = principal_points(place_N)
    errors_S1, guests_S = np.full((len(seen_S), 1), 0.3), np.zeros(len(seen_S), dtype=bool)
    observed = Observed(points[seen_S], strength_N[seen_S], influence_S[:, None], errors_S1, guests_S)
    own_N = np.full(prompts, -1)
    own_N[seen_S] = np.arange(len(seen_S))
    bandwidth = trust_of(observed)[1]
    found, usual = {}, pooling.CELLS
    try:
        for part in PARTS:
            pooling.CELLS = -(-len(seen_S) // part)
            found[part] = pooled_slopes(points, observed, own_N, bandwidth).values_NV[:, 0]
    finally:
        pooling.CELLS = usual
    best = {part: np.argsort(-values)[: int(CHOSEN * prompts)] for part, values in found.items()}
    return [
        (
            part,
            float(np.corrcoef(values, found[1])[0, 1]),
            top_overlap(values, found[1], CHOSEN),
            float(slope_N[best[part]].mean()),
        )
        for part, values in found.items()
    ]


if __name__ == "__main__":
    main()
