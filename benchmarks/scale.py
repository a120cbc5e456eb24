"""What choosing costs as the pool grows: time and memory of fusion and selection, and of the feature store.

    python benchmarks/scale.py select --sizes 10000,100000,1000000,10000000
    python benchmarks/scale.py store --sizes 1000,4000,16000 --dim 32768
    python benchmarks/scale.py figure docs/figures/scale.json docs/figures/scale.svg

`select`: influence on four validation sets is simulated; measured is what `cropi select` then does: four rankings,
their fusion, the choice of a tenth with 5 % explored and a quota on one of five sources, and the selection's files.
`store`: features are simulated; measured is writing them shard by shard, and scoring them against four validation
directions as they are read back. Each size is a process of its own, alone; memory is the most that it ever held, the
imports' own included. Sizes go round in turn; printed are the medians with the lowest and highest of the rounds, and
the exponent of a power law fitted to them: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SETS = 4
KINDS = {"select": ("seconds",), "store": ("write_s", "score_s")}


def select(size: int, folder: Path) -> dict[str, float]:
    """Rank, fuse, choose and write a pool of `size` prompts with simulated influence."""
    import numpy as np

    from cropi.config import Config
    from cropi.loading import load_config
    from cropi.selection.candidates import Candidates
    from cropi.selection.select import select as choose_and_write

    generator = np.random.default_rng(0)
    ids = [f"{number:016x}" for number in range(size)]
    sources = [f"source {number % 5}" for number in range(size)]
    config: Config = load_config(
        "quickstart", ["select.fraction=0.1", "select.exploration=0.05", 'select.quotas={"source 0": 0.1}']
    )
    candidates = Candidates(
        prompt_ids=ids,
        sources=sources,
        statuses=["ok"] * size,
        pass_rates_N=generator.integers(1, 8, size) / 8,
        training_pass_rates={},
        influence={f"set {v}": generator.standard_normal(size) for v in range(SETS)},
        stage=0,
        seed=0,
    )

    class Prompts(dict[str, Any]):
        def __missing__(self, prompt_id: str) -> dict[str, str]:
            return {"messages": '"a problem"', "answer": "7"}

    started = time.perf_counter()
    choose_and_write(config, config.select.strategy, candidates, Prompts(), folder)
    return {"seconds": time.perf_counter() - started}


def store(size: int, folder: Path, dim: int) -> dict[str, float]:
    """Write a store of `size` features and score it."""
    import torch

    from cropi.gradients.store import FeatureStoreWriter, StoreIdentity, open_store

    torch.set_num_threads(1)
    plain = {"policy": "p", "tokenizer": "t", "trajectories": "t", "projection": "p", "directions": ""}
    how = {"normalizer": "constant", "correction": "token", "baseline": "group", "advantage_std": False}
    numbers = {"max_completion_length": 1, "temperature": 1.0, "clip": 0.2, "prefix_cap": 2.0}
    identity = StoreIdentity(**plain, **how, **numbers, dtype="bfloat16", dim=dim)
    ids = [f"{number:016x}" for number in range(size)]
    facts = {"status": "ok", "norm": 1.0, "ratio_ess": 1.0, "clip_share": 0.0, "kl": 0.0, "tokens": 1}
    features = torch.randn(256, dim)
    started = time.perf_counter()
    writer = FeatureStoreWriter(folder, identity, ids)
    for index in writer.missing():
        part = writer.shard(index)
        count = part.stop - part.start
        writer.write_shard(index, features[:count], [{"prompt_id": i, **facts} for i in ids[part]])
    writer.finish()
    written = time.perf_counter()
    open_store(folder).influence(torch.randn(SETS, dim))
    return {"write_s": written - started, "score_s": time.perf_counter() - written}


def one(kind: str, size: int, dim: int) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "one", kind, "--sizes", str(size), "--dim", str(dim)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)  # noqa: S603 - this file
    return dict(json.loads(done.stdout.splitlines()[-1]))


def exponent(sizes: list[int], values: list[float]) -> float:
    """Slope of a straight line through the logarithms."""
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in xs)


def measured(kind: str, sizes: list[int], rounds: int, dim: int) -> list[dict[str, Any]]:
    """Of every size the median, lowest and highest of the rounds."""
    found: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for number in range(rounds):
        for size in sizes:
            print(f"round {number + 1}/{rounds}, {size:,}", file=sys.stderr, flush=True)
            found[size].append(one(kind, size, dim))
    rows = []
    for size, results in found.items():
        row: dict[str, Any] = {"size": size}
        for name in (*KINDS[kind], "peak_gib"):
            values = [result[name] for result in results]
            row[name] = {"median": statistics.median(values), "low": min(values), "high": max(values)}
        rows.append(row)
    return rows


def show(kind: str, rows: list[dict[str, Any]]) -> None:
    names = (*KINDS[kind], "peak_gib")
    print(f"| prompts | {' | '.join(names)} |")
    print("|---|" + "---|" * len(names))
    for row in rows:
        cells = [f"{row[n]['median']:.3g} ({row[n]['low']:.3g}–{row[n]['high']:.3g})" for n in names]
        print(f"| {row['size']:,} | {' | '.join(cells)} |")
    sizes = [row["size"] for row in rows]
    for name in KINDS[kind] if len(rows) > 1 else ():
        print(f"{name} grows with size^{exponent(sizes, [row[name]['median'] for row in rows]):.2f}")


def figure(source: Path, target: Path) -> None:
    """Time and memory against the size of the pool, both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    results = json.loads(source.read_text(encoding="utf-8"))
    drawn, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for kind, rows in results["measured"].items():
        sizes = [row["size"] for row in rows]
        for name in KINDS[kind]:
            label = {"seconds": "fuse and select", "write_s": "store: write", "score_s": "store: read and score"}[name]
            axes[0].plot(sizes, [row[name]["median"] for row in rows], marker="o", label=label)
        label = "fuse and select" if kind == "select" else "store"
        axes[1].plot(sizes, [row["peak_gib"]["median"] for row in rows], marker="o", label=label)
    for axis, title in zip(axes, ("seconds", "peak memory, GiB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="prompts", title=title)
        axis.legend(frameon=False)
    drawn.savefig(target, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["select", "store", "figure", "one"])
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--sizes", default="10000,100000,1000000", help="prompts, by commas")
    parser.add_argument("--dim", type=int, default=32768, help="numbers of a feature")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="add the results to this file")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    if arguments.what == "figure":
        figure(Path(arguments.rest[0]), Path(arguments.rest[1]))
        return
    if arguments.what == "one":
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "made"
            kind = arguments.rest[0]
            found = select(sizes[0], place) if kind == "select" else store(sizes[0], place, arguments.dim)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(found | {"peak_gib": peak}))
        return
    rows = measured(arguments.what, sizes, arguments.rounds, arguments.dim)
    show(arguments.what, rows)
    if arguments.json is not None:
        known = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {"measured": {}}
        known["measured"][arguments.what] = rows
        known |= {"machine": f"{os.cpu_count()} CPUs, {platform.machine()}", "dim": arguments.dim, "sets": SETS}
        arguments.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
