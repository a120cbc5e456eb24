"""Strong scaling of scoring: the same pool scored by one process and by several, measured in turn.

    python benchmarks/scaling.py --processes 1,2 --rounds 3 --json research/figures/scaling.json

A pool of built-in problems is collected once, by the most processes. Then rounds go through the numbers of processes
in turn; each time the scores of the first stage are made anew by `cropi score`, with one thread a process, under
`torchrun` where there are several. Seconds are those of scoring itself, from the run's ledger: directions, parts and
table, not the start of Python. Efficiency is the time of one process over p times that of p; printed are medians with
the lowest and highest of the rounds, and beside them the seconds of the whole command, start included. The scores of
every number of processes are compared byte by byte.

On a machine that does other work as well, fewer processes get more of a core each. With `--fill` as many jobs run side
by side as make up the largest number of processes, each in a folder of its own: two of one process beside one of two.
All are then pressed alike, and what is left is the cost of dividing the work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FAMILIES = ["sum", "alternate", "product", "horner", "parity", "maximum", "count", "machine"]
RUN = Path("runs/scaling")


def settings(prompts: int, validation: int) -> list[str]:
    """A run that only its first scoring is wanted of."""
    count = prompts // len(FAMILIES)
    sources = ", ".join(
        f"{name}: [{{type: builtin, families: [{name}], count: {validation}, seed: 2}}]" for name in ("sum", "machine")
    )
    return [
        "name=scaling",
        f"prompts.train=[{{type: builtin, families: [{', '.join(FAMILIES)}], count: {count}, seed: 1}}]",
        f"prompts.validation={{{sources}}}",
        "select.strategy=influence",
        "collect.shard_prompts=32",
    ]


def start(processes: int, command: str, options: list[str], cwd: Path) -> subprocess.Popen[bytes]:
    """A command by so many processes of one thread each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(  # noqa: S603 - this project's own command
        [sys.executable, *(launcher if processes > 1 else []), "-m", "cropi", command, "quickstart", *options],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def scored(processes: int, options: list[str], folders: list[Path]) -> list[dict[str, Any]]:
    """Make the scores anew in every folder at once."""
    from cropi.streams import read_jsonl

    for cwd in folders:
        shutil.rmtree(cwd / RUN / "scores", ignore_errors=True)
    started = time.perf_counter()
    jobs = [start(processes, "score", options, cwd) for cwd in folders]
    found = []
    for job, cwd in zip(jobs, folders, strict=True):
        if job.wait():
            raise RuntimeError(f"scoring in {cwd} ended with {job.returncode}")
        whole = time.perf_counter() - started
        entry = [line for line in read_jsonl(cwd / RUN / "ledger.jsonl") if "computed_tokens" in line][-1]
        scores = cwd / RUN / "scores/stage-000/scores.parquet"
        found.append(
            {
                "seconds": entry["seconds"] / entry.get("processes", 1),
                "command_seconds": whole,
                "scores": hashlib.sha256(scores.read_bytes()).hexdigest(),
            }
        )
    return found


def measured(counts: list[int], rounds: int, options: list[str], fill: bool) -> list[dict[str, Any]]:
    """A row for every number of processes."""
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / str(number) for number in range(max(counts) // min(counts) if fill else 1)]
        folders[0].mkdir()
        if start(max(counts), "collect", options, folders[0]).wait():
            raise RuntimeError("the collection failed")
        for other in folders[1:]:
            shutil.copytree(folders[0], other)
        for number in range(rounds):
            for count in counts:
                print(f"round {number + 1}/{rounds}, {count} processes", file=sys.stderr, flush=True)
                found[count] += scored(count, options, folders[: max(counts) // count] if fill else folders)
    alone = statistics.median(result["seconds"] for result in found[counts[0]])
    rows = []
    for count, results in found.items():
        row: dict[str, Any] = {"processes": count}
        for name in ("seconds", "command_seconds"):
            values = [result[name] for result in results]
            row[name] = {"median": statistics.median(values), "low": min(values), "high": max(values)}
        row["efficiency"] = alone * counts[0] / (count * row["seconds"]["median"])
        row["scores"] = sorted({result["scores"] for result in results})
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print("| processes | scoring, s | efficiency | whole command, s |")
    print("|---|---|---|---|")
    for row in rows:
        scoring, whole = (
            f"{row[name]['median']:.1f} ({row[name]['low']:.1f}–{row[name]['high']:.1f})"
            for name in ("seconds", "command_seconds")
        )
        print(f"| {row['processes']} | {scoring} | {row['efficiency']:.2f} | {whole} |")
    same = len({digest for row in rows for digest in row["scores"]}) == 1
    print("scores: the same bytes everywhere" if same else "scores: NOT the same")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2", help="numbers of processes, by commas; the first is the measure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=1920, help="pool")
    parser.add_argument("--validation", type=int, default=64, help="prompts of each of the two validation sets")
    parser.add_argument("--fill", action="store_true", help="keep all cores busy whatever the number of processes")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.processes.split(",")]
    options = settings(arguments.prompts, arguments.validation)
    rows = measured(counts, arguments.rounds, options, arguments.fill)
    show(rows)
    if arguments.json is not None:
        from cropi.lab.bench.machine import describe

        names = ("rounds", "prompts", "validation", "fill")
        used = {name: getattr(arguments, name) for name in names}
        result = {"measured": rows, **used, "machine": describe("cpu", 1)}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
