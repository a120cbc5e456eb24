"""What pooling over neighbours is worth: how good the selected tenth is, by what influence was estimated from.

Samples K = `--trajectories` of every prompt of a scenario from the base policy. The first eight are what a method may
see, of a share of the pool; the rest are the truth, drawn independently. The value of a selection is the mean true
influence of its prompts, summed over validation sets, over that of the best selection there is.

    python benchmarks/pooling.py --seeds 100,101 --out research/figures/pooling.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from cropi.cli.shell import quiet_libraries
from cropi.functional.pooling import (
    Observed,
    bandwidth_of,
    pooled_slopes,
    pooled_strengths,
    principal_points,
    trust_of,
)
from cropi.gradients.score_reliability import half_factors
from cropi.lab.bench.machine import describe

SHARES = (1.0, 0.5, 0.25, 0.125)
COUNTS = (8, 4)
KEPT = 0.1  # of the pool


@dataclass(frozen=True)
class Pool:
    """Inner products of every trajectory with V validation directions, scaled as in the loss; M validation prompts."""

    rewards_NK: np.ndarray
    products_NKV: np.ndarray
    places_NE: np.ndarray
    validation_places_ME: np.ndarray
    validation_strengths_M: np.ndarray
    validation_influence_MV: np.ndarray
    validation_errors_MV: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="suite/noisy-labels")
    parser.add_argument("--seeds", default="100,101")
    parser.add_argument("--trajectories", type=int, default=48)
    parser.add_argument("--draws", type=int, default=10, help="of the share that is sampled")
    parser.add_argument("--run-dir", default="runs/pooling", help="collections in it are kept")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rows = [row for seed in seeds for row in evaluate(load(options, seed), seed, options.draws)]
    table = summary(rows)
    print(as_text(table))
    if options.out:
        settings = {**vars(options), "out": None, "run_dir": None}
        found = {"environment": describe("cpu", 1), "options": settings, "table": table}
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def load(options: argparse.Namespace, seed: int) -> Pool:
    """Collect, and take all trajectories' inner products with the validation directions."""
    quiet_libraries()
    from cropi.gradients.groups import iterate_groups
    from cropi.gradients.score_shards import make_scorer
    from cropi.gradients.validation_groups import validation_groups
    from cropi.gradients.validation_scores import score_validation_prompts
    from cropi.lab.audit.trajectory_products import trajectory_products
    from cropi.loading import load_config
    from cropi.rollouts.representations import read_representations, represent
    from cropi.stages.collect import collect
    from cropi.stages.run import Run

    overrides = [f"seed={seed}", f"name=seed-{seed}", f"run_dir={options.run_dir}"]
    overrides += ["select.strategy.type=influence", f"collect.num_generations={options.trajectories}"]
    config = load_config(options.config, overrides)
    pipeline = Run(config)
    collect(pipeline)
    validation = validation_groups(pipeline.trajectories.base, config.score)
    exact = config.model_copy(update={"score": config.score.model_copy(update={"estimator": "exact"})})
    exactly, sketched = (make_scorer(one, pipeline.base.model, pipeline.surrogate) for one in (exact, config))
    exactly.aim(validation)
    sketched.aim(validation)
    groups = [group for _, group in iterate_groups(pipeline.trajectories.base["train"]) if group is not None]
    products = [
        one.products_KV if len(one.products_KV) else np.zeros((options.trajectories, len(validation)))
        for one, _ in trajectory_products(exactly, groups)
    ]
    evidence, _ = score_validation_prompts(sketched, validation)
    folder = pipeline.folder.folder / "places"
    represent(config, pipeline.base, pipeline.folder.prompt_rows, folder)
    places = read_representations(folder)
    keys = [("train", group.prompt_id) for group in groups]
    keys += [(f"validation/{row['set']}", row["prompt_id"]) for row in evidence]
    points = principal_points(np.stack([places[key] for key in keys]))
    p_M, tries_M = (np.array([row[column] for row in evidence]) for column in ("pass_rate", "trajectories"))
    by_set = {
        kind: np.array([[row[f"{kind}/{name}"] for name in validation] for row in evidence])
        for kind in ("influence", "standard_error")
    }
    return Pool(
        np.array([group.rewards for group in groups]),
        np.stack(products) / config.collect.max_completion_length,
        points[: len(groups)],
        points[len(groups) :],
        p_M * (1 - p_M) * tries_M / (tries_M - 1),
        by_set["influence"],
        by_set["standard_error"],
    )


def parts(rewards_NK: np.ndarray, products_NKV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Influence of every prompt and its error from two halves, for advantages against the group's mean over K."""
    advantages_NK = rewards_NK - rewards_NK.mean(axis=1, keepdims=True)
    terms_NKV = advantages_NK[:, :, None] * products_NKV / rewards_NK.shape[1]
    first_NK = np.array([half_factors(rewards)[0] for rewards in rewards_NK.tolist()])
    first_NV = (terms_NKV * first_NK[:, :, None]).sum(axis=1)
    total_NV = terms_NKV.sum(axis=1)
    return total_NV, np.abs(2 * first_NV - total_NV)


def evaluate(pool: Pool, seed: int, draws: int) -> Iterator[dict[str, Any]]:
    """Values of all methods, by trajectories seen and share of the pool, for some draws of that share."""
    truth_N = parts(pool.rewards_NK[:, max(COUNTS) :], pool.products_NKV[:, max(COUNTS) :])[0].sum(axis=1)
    size = round(KEPT * len(truth_N))
    best = np.sort(truth_N)[-size:].mean()
    for count in COUNTS:
        for share in SHARES:
            for draw in range(1 if share == 1 else draws):
                seen_S = np.random.default_rng([seed, draw]).permutation(len(truth_N))[: round(share * len(truth_N))]
                for method, scores_N in methods(pool, np.sort(seen_S), count).items():
                    value = truth_N[np.argsort(-scores_N)[:size]].mean() / best
                    yield {"seed": seed, "trajectories": count, "share": share, "method": method, "value": float(value)}


def methods(pool: Pool, seen_S: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Scores of all prompts by each method, from `count` trajectories of the prompts seen."""
    rewards_SK = pool.rewards_NK[seen_S, :count]
    influence_SV, errors_SV = parts(rewards_SK, pool.products_NKV[seen_S, :count])
    total = len(pool.places_NE)
    own_N = np.full(total, -1)
    own_N[seen_S] = np.arange(len(seen_S))
    raw_N = np.full(total, -np.inf)
    raw_N[seen_S] = influence_SV.sum(axis=1)
    both = Observed(
        np.concatenate([pool.places_NE[seen_S], pool.validation_places_ME]),
        np.concatenate([_strengths(rewards_SK), pool.validation_strengths_M]),
        np.concatenate([influence_SV, pool.validation_influence_MV]),
        np.concatenate([errors_SV, pool.validation_errors_MV]),
        guests_O=np.arange(len(seen_S) + len(pool.validation_places_ME)) >= len(seen_S),
    )
    found = {"each prompt alone": raw_N}
    trust, bandwidth_with = trust_of(both)
    without = both.trusting(0.0)
    judged = {
        "with validation prompts": (both.trusting(trust), bandwidth_with),
        "without": (without, bandwidth_of(without)),
    }
    for name, (observed, bandwidth) in judged.items():
        tries_S = np.full(len(seen_S), float(count))
        tried_SE = pool.places_NE[seen_S]
        successes_S = rewards_SK.sum(axis=1)
        _, w_N = pooled_strengths(pool.places_NE, tried_SE, successes_S, tries_S, own_N, bandwidth, prior=2.0)
        for own in (True, False):
            rows_N = own_N if own else np.full(total, -1)
            slopes = pooled_slopes(pool.places_NE, observed, rows_N, bandwidth)
            label = "pooled" if own else "neighbours alone"
            found[f"{label}, {name}"] = w_N * slopes.values_NV.sum(axis=1)
    return found


def _strengths(rewards_NK: np.ndarray) -> np.ndarray:
    p_N, count = rewards_NK.mean(axis=1), rewards_NK.shape[1]
    strengths_N: np.ndarray = p_N * (1 - p_N) * count / (count - 1)
    return strengths_N


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds and draws, and the lowest and highest seed."""
    keys = list(dict.fromkeys((row["method"], row["trajectories"], row["share"]) for row in rows))
    table = []
    for method, count, share in keys:
        by_seed: dict[int, list[float]] = {}
        for row in rows:
            if (row["method"], row["trajectories"], row["share"]) == (method, count, share):
                by_seed.setdefault(row["seed"], []).append(row["value"])
        means = [mean(values) for values in by_seed.values()]
        known = {"method": method, "trajectories": count, "share": share}
        table.append(known | {"value": mean(means), "low": min(means), "high": max(means)})
    return table


def as_text(table: list[dict[str, Any]]) -> str:
    lines = [f"{'method':<42} {'K':>2} " + " ".join(f"{share:>16g}" for share in SHARES)]
    for method in dict.fromkeys(row["method"] for row in table):
        for count in COUNTS:
            own = {r["share"]: r for r in table if (r["method"], r["trajectories"]) == (method, count)}
            cells = [f"{own[s]['value']:.2f} ({own[s]['low']:.2f}-{own[s]['high']:.2f})".rjust(16) for s in SHARES]
            lines.append(f"{method:<42} {count:>2} " + " ".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
