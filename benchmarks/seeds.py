"""Several runs that differ in their seed, side by side: a table of every arm from the runs' summary.json.

    for seed in 0 1 2; do cropi run quickstart name=quickstart-$seed seed=$seed; done
    python benchmarks/seeds.py runs/quickstart-*

A level is reached at the first evaluated step at or above it; `>` marks a run that never reached it. With a handful of
seeds the table prints all values instead of an interval.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def steps_to(arm: dict[str, Any], level: float) -> str:
    reached = [point["step"] for point in arm["curve"] if point["targeted"]["mean"] >= level]
    return str(reached[0]) if reached else f">{arm['steps']}"


def total(summary: dict[str, Any], arm: int) -> float:
    return float(summary["arms"][arm]["cost"]["total"])


def reference(summary: dict[str, Any]) -> int:
    """The arm whose time is 1: `full` where there is one, else the last."""
    names = [arm["name"] for arm in summary["arms"]]
    return names.index("full") if "full" in names else len(names) - 1


def rows(summaries: list[dict[str, Any]], level: float) -> list[list[str]]:
    table = []
    for number, arm in enumerate(summaries[0]["arms"]):
        arms = [summary["arms"][number] for summary in summaries]
        table.append(
            [
                arm["name"],
                " ".join(steps_to(a, level) for a in arms),
                " ".join(f"{a['curve'][-1]['targeted']['mean']:.2f}" for a in arms),
                " ".join(f"{a['curve'][-1]['untargeted']['mean']:.2f}" for a in arms),
                " ".join(f"{total(s, number) / total(s, reference(s)):.1f}" for s in summaries),
            ]
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--level", type=float, default=0.9, help="targeted accuracy that counts as reached")
    arguments = parser.parse_args()
    summaries = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in arguments.runs]
    unit = summaries[0]["arms"][reference(summaries[0])]["name"]
    print(f"seeds {', '.join(str(s['seed']) for s in summaries)}; in that order in every cell\n")
    print(f"| arm | steps to {arguments.level:g} | targeted at the end | untargeted | total time over {unit}'s |")
    print("|---|---|---|---|---|")
    for row in rows(summaries, arguments.level):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
