"""Scoring in bfloat16 beside scoring in float32: the same trajectories, policy and sketch, in turns.

    cropi collect gsm8k-smollm2
    python benchmarks/precision.py gsm8k-smollm2 --rounds 3 --out precision.json

Both score at the base policy with all importance ratios 1, so that what differs is the arithmetic of the passes alone.
Beside the agreement of the two stands what the choice itself can be trusted with: the agreement of float32 scores of
half of each prompt's trajectories with those of the other half.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cropi.artifacts import OK, read_table
from cropi.config import Config
from cropi.config.loading import load_config
from cropi.gradients.groups import surrogate_settings
from cropi.lab.audit.agreement import pearson, sign_agreement, spearman, top_overlap
from cropi.lab.bench.machine import describe
from cropi.policy import Policy, load_policy
from cropi.rollouts.shards import read_trajectories
from cropi.run_folder import RunFolder
from cropi.run_tables import scores_schema
from cropi.stages.score import ScoredPool, score_pool

DTYPES = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="as `cropi collect` had it")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=3, help="timed, after one that is not; 0: agreement alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    space = RunFolder(config)
    trajectories = _on_policy(read_trajectories(space.trajectories))
    policies = {dtype: load_policy(config.policy.model_copy(update={"dtype": dtype})) for dtype in DTYPES}
    found: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for number in range(options.rounds + 1):
        for dtype in DTYPES if number % 2 else reversed(DTYPES):
            started = time.perf_counter()
            found[dtype] = _scores(config, policies[dtype], trajectories)
            if number:  # the first round warms up
                seconds[dtype].append(time.perf_counter() - started)
    halves = [_scores(config, policies["float32"], _half(trajectories, odd)) for odd in (0, 1)]
    device = policies["float32"].device.type
    result = {
        "environment": describe(device, torch.get_num_threads()),
        "config": {"policy": config.policy.model_dump(), "score": config.score.model_dump(), "seed": config.seed},
        "prompts": len(found["float32"]["scored"]),
        "agreement": _agreement(found["bfloat16"], found["float32"], config.select.fraction),
        "halves": _agreement(halves[0], halves[1], config.select.fraction),
        "seconds": seconds,
        "ratio": [b / a for a, b in zip(seconds["float32"], seconds["bfloat16"], strict=True)],
    }
    print(_table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _on_policy(trajectories: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """Without behaviour log-probs, so that every ratio is 1 in either type."""
    name = "behaviour_logprobs"
    return {
        key: table.set_column(
            table.column_names.index(name),
            table.schema.field(name),
            pa.nulls(len(table), table.schema.field(name).type),
        )
        for key, table in trajectories.items()
    }


def _half(trajectories: dict[str, pa.Table], odd: int) -> dict[str, pa.Table]:
    """Every second trajectory of each prompt of the pool; the validation sets whole."""
    table = trajectories["train"]
    chosen = pc.equal(pc.bit_wise_and(table.column("sample"), 1), odd)
    return trajectories | {"train": table.filter(chosen)}


def _scores(config: Config, policy: Policy, trajectories: dict[str, pa.Table]) -> dict[str, Any]:
    """Influence on every validation set by prompt id, of the prompts that were scored."""
    prompts = dict.fromkeys(trajectories["train"].column("prompt_id").to_pylist(), "")
    settings = surrogate_settings(config, str(config.trainer.get("loss_type", "dapo")), True)
    with tempfile.TemporaryDirectory() as folder:
        score_pool(config, settings, policy.model, ScoredPool(trajectories, prompts), Path(folder))
        names = sorted(config.prompts.validation)
        rows = read_table(Path(folder) / "scores.parquet", scores_schema(names)).to_pylist()
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
    return {
        "scored": {row["prompt_id"] for row in rows if row["status"] == OK},
        "values": {row["prompt_id"]: [row[f"influence/{name}"] for name in names] for row in rows},
    }


def _agreement(found: dict[str, Any], true: dict[str, Any], share: float) -> dict[str, float]:
    """Means over the validation sets; over the prompts that have a score in both."""
    both = sorted(found["scored"] & true["scored"])
    found_NV, true_NV = (np.array([side["values"][i] for i in both]) for side in (found, true))
    pairs = list(zip(found_NV.T, true_NV.T, strict=True))
    return {
        "prompts": len(both),
        "spearman": float(np.mean([spearman(a, b) for a, b in pairs])),
        "pearson": float(np.mean([pearson(a, b) for a, b in pairs])),
        "top_overlap": float(np.mean([top_overlap(a, b, share) for a, b in pairs])),
        "sign_agreement": float(np.mean([sign_agreement(a, b) for a, b in pairs])),
        "relative_error": float(np.linalg.norm(found_NV - true_NV) / np.linalg.norm(true_NV)),
    }


def _table(result: dict[str, Any]) -> str:
    measures = {
        "spearman": "Spearman",
        "pearson": "Pearson",
        "top_overlap": "best tenth shared",
        "sign_agreement": "same sign",
        "relative_error": "relative error",
    }
    lines = ["| | prompts | " + " | ".join(measures.values()) + " |", "|" + "---|" * (2 + len(measures))]
    rows = {"agreement": "bfloat16 against float32", "halves": "one half of the trajectories against the other"}
    for key, label in rows.items():
        row = result[key]
        lines.append(f"| {label} | {row['prompts']} | " + " | ".join(f"{row[name]:.3f}" for name in measures) + " |")
    ratios = result["ratio"]
    machine = result["environment"]["gpu"] or result["environment"]["cpu"]
    if ratios:
        lines.append(
            f"\nTime of bfloat16 over float32: {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}, {len(ratios)} rounds), on {machine}."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
