"""What choosing costs as the pool grows: time and memory of fusion and selection, and of `cropi`'s belief.

    python benchmarks/scale.py select --sizes 10000,100000,1000000,10000000 --rounds 3 --json scale.json
    python benchmarks/scale.py curriculum --sizes 100000,1000000 --rounds 1
    python benchmarks/scale.py figure research/figures/scale.json research/figures/scale.svg
    python benchmarks/scale.py table research/figures/scale.json

`select`: influence on four validation sets is simulated; measured is what `cropi select` then does: four rankings,
their fusion, the choice of a tenth, and the selection's files.
`curriculum`: points and influence on one validation set are simulated; measured is building `Curriculum`, and the
processor's seconds of `next(128)` with the observation of 128 groups: their mean, and the slowest, which chooses
hyper-parameters.

Every measurement is a process of its own, alone, after a small pool that loads what is loaded late. Memory is the most
that it ever held, the imports' own included. Sizes go round in turn; each command adds its rounds to the file. Shown
are medians, with the lowest and highest of the rounds, and the exponent of a power law fitted to them: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SETS = 4
WARM_UP = 256  # prompts
KINDS = {
    "select": {"seconds": "fuse, select, write"},
    "curriculum": {"build_s": "build", "step_s": "step", "slowest_s": "slowest step"},
}
ABOUT = {"select": f"fuse and select, {SETS} sets", "curriculum": "belief and choice"}
FIGURE = ("select",)
PROMPTS, GENERATIONS, STEPS = 128, 8, 8  # of a batch, of a group, of a measurement


def select(size: int, folder: Path) -> dict[str, float]:
    """Rank, fuse, choose and write a pool of `size` prompts with simulated influence."""
    import numpy as np

    from cropi.config import Config
    from cropi.config.loading import load_config
    from cropi.curriculum.strategy import Candidates
    from cropi.stages.select import choose_prompts

    generator = np.random.default_rng(0)
    ids = [f"{number:016x}" for number in range(size)]
    sources = [f"source {number % 5}" for number in range(size)]
    config: Config = load_config("quickstart", ["select.strategy=influence", "select.fraction=0.1"])
    rates_N = generator.integers(1, 8, size) / 8
    candidates = Candidates(
        prompt_ids=ids,
        sources=sources,
        statuses=["ok"] * size,
        pass_rates_N=rates_N,
        variances_N=rates_N * (1 - rates_N),
        training_variances={},
        influence={f"set {v}": generator.standard_normal(size) for v in range(SETS)},
        stage=0,
        seed=0,
    )

    class Prompts(dict[str, Any]):
        def __missing__(self, prompt_id: str) -> dict[str, str]:
            return {"messages": '"a problem"', "answer": "7"}

    started, used = time.perf_counter(), time.process_time()
    choose_prompts(config, candidates, Prompts(), folder)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - used
    return {"seconds": seconds, "cpu_s": cpu_s, "stored_bytes": stored(folder)}


def curriculum(size: int, folder: Path) -> dict[str, float]:
    """Build a curriculum, and let it choose batches and learn of their groups."""
    import numpy as np

    from cropi.curriculum.curriculum import Curriculum

    generator = np.random.default_rng(0)
    points_NE, held_out_ME = (generator.standard_normal((count, 32)) / 32**0.5 for count in (size, 64))
    started, used, seconds = time.perf_counter(), time.process_time(), []
    chooser = Curriculum(points_NE, {"set": held_out_ME}, seed=0, batch=PROMPTS, generations=GENERATIONS)
    built = time.perf_counter()
    for step in range(STEPS):
        began = time.process_time()
        for number, choice in enumerate(chooser.next(PROMPTS, step)):
            rewards = generator.integers(0, 2, GENERATIONS).astype(float)
            influence = {"set": points_NE[choice.place, 0] + generator.standard_normal((2, 2))}
            chooser.observe(choice, rewards, step=step, group=f"{step}-{number}", influence=influence)
        seconds.append(time.process_time() - began)
    found = {"build_s": built - started, "step_s": statistics.fmean(seconds), "slowest_s": max(seconds)}
    return found | {"cpu_s": time.process_time() - used, "stored_bytes": stored(folder)}


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def one(kind: str, size: int) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "one", kind, "--sizes", str(size)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)  # noqa: S603 - this file
    return dict(json.loads(done.stdout.splitlines()[-1]))


def one_here(kind: str, size: int) -> dict[str, float]:
    """Measure in this process, after a pool so small that only the imports take time."""
    with tempfile.TemporaryDirectory() as folder:
        for count, name in ((WARM_UP, "small"), (size, "made")):
            place = Path(folder) / name
            found = select(count, place) if kind == "select" else curriculum(count, place)
    return found | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def exponent(sizes: list[int], values: list[float]) -> float:
    """Slope of a straight line through the logarithms."""
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in xs)


def exponent_interval(by_size: dict[int, list[float]], redraws: int = 2000) -> tuple[float, float, float]:
    """The exponent through the medians, and 95 % of what it is when the rounds of every size are drawn again."""
    generator, sizes = random.Random(0), list(by_size)
    drawn = sorted(
        exponent(sizes, [statistics.median(generator.choices(by_size[size], k=len(by_size[size]))) for size in sizes])
        for _ in range(redraws)
    )
    through = exponent(sizes, [statistics.median(by_size[size]) for size in sizes])
    return through, drawn[round(0.025 * redraws)], drawn[round(0.975 * redraws) - 1]


def grouped(results: dict[str, Any], kind: str, name: str) -> dict[int, list[float]]:
    """All rounds of one number, by size."""
    rounds = [row for row in results["rounds"] if row["kind"] == kind]
    sizes = sorted({row["size"] for row in rounds})
    return {size: [row[name] for row in rounds if row["size"] == size] for size in sizes}


def table(results: dict[str, Any], kind: str) -> str:
    """Markdown: a row for every size, and the exponents below."""
    names = [*KINDS[kind], "cpu_s", "peak_gib"]
    columns = {name: grouped(results, kind, name) for name in names}
    lines = [f"| prompts | rounds | {' | '.join(names)} | stored, GB |", "|---|---|" + "---|" * (len(names) + 1)]
    for size, kept in grouped(results, kind, "stored_bytes").items():
        cells = [_spread(columns[name][size]) for name in names]
        lines.append(f"| {size:,} | {len(kept)} | {' | '.join(cells)} | {statistics.median(kept) / 1e9:.3g} |")
    lines.append("")
    for name in (*KINDS[kind], "cpu_s") if len(columns["cpu_s"]) > 1 else ():
        *_, before, last = columns[name]
        local = exponent([before, last], [statistics.median(columns[name][size]) for size in (before, last)])
        whole, low, high = exponent_interval(columns[name])
        lines.append(f"{name} grows as size^{whole:.2f} [{low:.2f}, {high:.2f}]; from {before:,} on, ^{local:.2f}")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    middle = f"{statistics.median(values):.3g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3g}–{max(values):.3g})"


def figure(source: Path, target: Path) -> None:
    """Time and memory against the size of the pool, both axes logarithmic."""
    import matplotlib as mpl

    results = json.loads(source.read_text(encoding="utf-8"))
    with mpl.rc_context({"svg.hashsalt": "cropi", "svg.fonttype": "none", "font.size": 9.0}):
        _drawn(results).savefig(target, format="svg", metadata={"Date": None})


def _drawn(results: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    from cropi.report.figures import BLUE

    drawn = Figure(figsize=(11.5, 4.2), layout="constrained", facecolor="white")
    axes = drawn.subplots(1, 3)
    for kind in FIGURE:
        about = ABOUT[kind]
        look = {"color": BLUE, "marker": "o", "markersize": 4}
        _line(axes[0], grouped(results, kind, "cpu_s"), f"{about}: {_exponent(results, kind, 'cpu_s')}", look)
        _line(axes[2], grouped(results, kind, "peak_gib"), about, look)
        for name, label in KINDS[kind].items():
            _line(axes[1], grouped(results, kind, name), f"{label}: {_exponent(results, kind, name)}", look)
    sizes = [row["size"] for row in results["rounds"]]
    least = min(min(grouped(results, kind, "cpu_s").values())[0] for kind in FIGURE)
    for axis in axes[:2]:
        ends = (min(sizes), max(sizes))
        axis.plot(ends, [least * end / ends[0] for end in ends], color="#999999", linewidth=0.8, label="linear growth")
        axis.set_ylim(least / 3, 3e5)  # room for the legend
    titles = ("processor seconds", "seconds on the clock, shared machine", "peak memory of the process, GiB")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xscale="log", yscale="log", xlabel="prompts in the pool", facecolor="white")
        axis.set_title(title, loc="left", fontsize=9.5)
        axis.grid(which="major", color="#e4e4e4", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="upper left", fontsize=7.5)
    axes[2].set_ylim(0.1, 100)
    axes[2].set_yticks([0.1, 0.3, 1, 3, 10, 30], labels=["0.1", "0.3", "1", "3", "10", "30"])
    return drawn


def _exponent(results: dict[str, Any], kind: str, name: str) -> str:
    return "exponent {:.2f} [{:.2f}, {:.2f}]".format(*exponent_interval(grouped(results, kind, name)))


def _line(axis: Any, by_size: dict[int, list[float]], label: str, look: dict[str, Any]) -> None:
    """Medians, with bars from the lowest to the highest of the rounds."""
    middles = [statistics.median(values) for values in by_size.values()]
    below = [middle - min(values) for middle, values in zip(middles, by_size.values(), strict=True)]
    above = [max(values) - middle for middle, values in zip(middles, by_size.values(), strict=True)]
    axis.errorbar(list(by_size), middles, yerr=[below, above], label=label, linewidth=1.2, capsize=2, **look)


def measure(kind: str, sizes: list[int], rounds: int, file: Path | None) -> dict[str, Any]:
    """Every size once a round; each measurement is kept as soon as it is there."""
    from cropi.lab.bench.machine import describe

    results: dict[str, Any] = {"machine": {}, "sets": SETS, "rounds": []}
    if file is not None and file.is_file():
        results = json.loads(file.read_text(encoding="utf-8"))
    results["machine"][kind] = describe("cpu", 1)
    for number in range(rounds):
        for size in sizes:
            print(f"round {number + 1}/{rounds}, {size:,}", file=sys.stderr, flush=True)
            results["rounds"].append({"kind": kind, "size": size, **one(kind, size)})
            if file is not None:
                file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*KINDS, "figure", "table", "one"])
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--sizes", default="10000,100000,1000000", help="prompts, by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="add the rounds to this file")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    if arguments.what == "figure":
        figure(Path(arguments.rest[0]), Path(arguments.rest[1]))
    elif arguments.what == "table":
        results = json.loads(Path(arguments.rest[0]).read_text(encoding="utf-8"))
        found = [kind for kind in KINDS if any(row["kind"] == kind for row in results["rounds"])]
        print("\n\n".join(f"{ABOUT[kind]}\n\n{table(results, kind)}" for kind in found))
    elif arguments.what == "one":
        print(json.dumps(one_here(arguments.rest[0], sizes[0])))
    else:
        print(table(measure(arguments.what, sizes, arguments.rounds, arguments.json), arguments.what))


if __name__ == "__main__":
    main()
