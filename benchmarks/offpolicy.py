"""How far off-policy influence agrees with on-policy influence, stage by stage, with several seeds.

Trains the quickstart under `influence` with each seed, keeps every stage's policy, and audits them all (`cropi audit`).
Seeds change the base policy's trajectories, the training and the audit's own sample.

    python benchmarks/offpolicy.py --seeds 3 --out research/figures/offpolicy.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from cropi.lab.bench.machine import describe

SETTINGS = ["select.strategy=influence", "trainer.save_total_limit=100"]
MEASURES = ("spearman", "top_overlap", "sign_agreement")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--trajectories", type=int, default=32)
    parser.add_argument("--run-dir", default="runs/offpolicy", help="finished runs and audits in it are kept")
    parser.add_argument("--set", action="append", default=[], help="a further setting of the runs, key=value")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    audits = [_audit(seed, options) for seed in range(options.seeds)]
    result = {
        "environment": describe("cpu", 1),
        "options": {**vars(options), "out": None, "run_dir": None},
        "rows": _rows(audits),
        "audits": audits,
    }
    print(_table(result["rows"]))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _audit(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    overrides = [f"name=seed-{seed}", f"seed={seed}", f"run_dir={options.run_dir}", *SETTINGS, *options.set]
    size = ["--prompts", str(options.prompts), "--trajectories", str(options.trajectories), "--seed", str(seed)]
    for command in (["run", "quickstart", *overrides], ["audit", "quickstart", *overrides, *size]):
        subprocess.run(  # noqa: S603 - this very package's command
            [sys.executable, "-m", "cropi", *command], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    found: dict[str, Any] = json.loads((Path(options.run_dir) / f"seed-{seed}" / "audit.json").read_text())
    return found


def _rows(audits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds and validation sets, and the lowest and highest, by stage."""
    rows = []
    for number, _ in enumerate(audits[0]["stages"]):
        stages = [audit["stages"][number] for audit in audits]
        sets = [part for stage in stages for part in stage["sets"].values()]
        last = [part["by_trajectories"][-1] for part in sets]
        row: dict[str, Any] = {"stage": stages[0]["stage"], "trajectories": last[0]["trajectories"]}
        for measure in MEASURES:
            for side in ("off_policy", "ceiling"):
                row[f"{measure}/{side}"] = _spread([at[side][measure]["value"] for at in last])
        for variant in sets[0]["variants"]:
            parts = [part["variants"][variant] for part in sets]
            row[f"variant/{variant}"] = _spread([part["overall"]["spearman"]["value"] for part in parts])
            for name in ("bias", "variance", "slope"):
                row[f"{name}/{variant}"] = _spread([part[name]["value"] for part in parts])
        for side in ("off_policy", "ceiling"):
            row[f"cosine/{side}"] = _spread([stage["gradient_cosine"][side]["median"] for stage in stages])
            row[f"above_0.6/{side}"] = _spread([stage["gradient_cosine"][side]["above_0.6"] for stage in stages])
            row[f"direction/{side}"] = _spread([part["direction_cosine"][side] for part in sets])
        for fact in ("ratio_ess", "clip_share", "kl"):
            row[fact] = _spread([stage["drift"][fact] for stage in stages])
        row["projection"] = _spread([part["projection"]["top_overlap"] for part in sets])
        rows.append(row)
    return rows


def _spread(values: list[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {"mean": mean(known), "low": min(known), "high": max(known), "count": len(known)} if known else None


def _table(rows: list[dict[str, Any]]) -> str:
    columns = [
        "spearman/off_policy", "spearman/ceiling", "top_overlap/off_policy", "top_overlap/ceiling", "cosine/off_policy",
        "cosine/ceiling", "direction/off_policy", "direction/ceiling", "variant/token", "variant/prefix",
        "ratio_ess", "kl", "projection",
    ]  # fmt: skip
    lines = ["| stage | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for row in rows:
        cells = [_cell(row[column]) for column in columns]
        lines.append(f"| {row['stage']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(spread: dict[str, float] | None) -> str:
    return "–" if spread is None else f"{spread['mean']:.2f} ({spread['low']:.2f}–{spread['high']:.2f})"


if __name__ == "__main__":
    main()
