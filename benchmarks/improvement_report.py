"""Tables and the figure of what `benchmarks/improvement.py` has measured.

python benchmarks/improvement_report.py research/figures/improvement.json research/figures/improvement.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from measured_improvement import Pair, over_subsets, rank_agreement, slope

from cropi.functional.agreement import spearman
from cropi.functional.bootstrap import Interval

BASE = "constant std dot"
SHOWN = [
    *(
        f"{z} {std} {score}"
        for z in ("constant", "token", "sequence")
        for std in ("std", "no std")
        for score in ("dot",)
    ),
    *(f"{z} std {score}" for z in ("constant", "token", "sequence") for score in ("cosine", "gain")),
    *(f"constant std {score} adam" for score in ("dot", "cosine", "gain")),
    *(f"sequence std {score} adam" for score in ("dot", "cosine")),
    "constant std/other dot",
    "constant std/other dot adam",
    "learnability",
    "constant std norm",
    "constant std norm adam",
    "sequence std norm",
    "family mean",
]
RATE = 2e-4
Cell = dict[str, Any]
Measure = Callable[[Cell], tuple[list[int], np.ndarray]]
"""Of a cell: which subsets, and what was measured of them."""


def move(kind: str, rate: float = RATE, where: str = "held-out") -> Measure:
    def of(cell: Cell) -> tuple[list[int], np.ndarray]:
        found = next(m for m in cell["moves"] if m["kind"] == kind and m["rate"] == rate)
        changes_S = np.array(found["changes"])[:, columns(cell, where)].mean(axis=1)
        return list(range(len(changes_S))), changes_S

    return of


def training(cell: Cell, where: str = "held-out") -> tuple[list[int], np.ndarray]:
    found = cell["stage"]
    return found["subsets"], np.array(found["changes"])[:, columns(cell, where)].mean(axis=1)


def columns(cell: Cell, where: str) -> list[int]:
    return [n for n, name in enumerate(cell["objective"]) if name.startswith(where)]


def score(cell: Cell, name: str, rows: Sequence[int]) -> np.ndarray:
    return np.array(cell["scores"][name])[rows].mean(axis=1)


def pairs(cells: Sequence[Cell], name: str, measure: Measure) -> list[tuple[np.ndarray, np.ndarray]]:
    found = []
    for cell in cells:
        rows, measured_S = measure(cell)
        found.append((score(cell, name, rows), measured_S))
    return found


def difference(mine: Sequence[Pair], base: Sequence[Pair]) -> Interval:
    """Spearman of one score minus that of another with the same measurements, paired over subsets."""

    def gap(rows: Sequence[np.ndarray]) -> float:
        gaps = [spearman(a[r], y[r]) - spearman(b[r], y[r]) for (a, y), (b, _), r in zip(mine, base, rows, strict=True)]
        return float(np.mean(gaps))

    return over_subsets(gap, [len(a) for a, _ in mine], times=1000, seed=0)


def text(value: Interval, digits: int = 2, sign: str = "") -> str:
    return f"{value.mean:{sign}.{digits}f} ({value.low:{sign}.{digits}f} to {value.high:{sign}.{digits}f})"


def kinds_of_update(cells: Sequence[Cell]) -> dict[str, Measure]:
    found: dict[str, Measure] = {"SGD step": move("sgd"), "Adam step": move("adam")}
    if all(cell["stage"] for cell in cells):
        found[f"{cells[0]['stage']['steps']} training steps"] = training
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def agreements(cells: Sequence[Cell], title: str, cut: Callable[[Cell], list[int]] | None = None) -> None:
    measures = kinds_of_update(cells)
    if cut is not None:
        measures = {name: restricted(measure, cut) for name, measure in measures.items()}
    rows = []
    for name in SHOWN:
        row = [name]
        for measure in measures.values():
            row.append(text(rank_agreement(pairs(cells, name, measure))))
            row.append(
                "–"
                if name == BASE
                else text(difference(pairs(cells, name, measure), pairs(cells, BASE, measure)), sign="+")
            )
        rows.append(row)
    head = ["score", *(part for name in measures for part in (name, f"minus {BASE}"))]
    table(head, rows, title)


def restricted(measure: Measure, cut: Callable[[Cell], list[int]]) -> Measure:
    """Of some of the subsets alone."""

    def of(cell: Cell) -> tuple[list[int], np.ndarray]:
        rows, measured_S = measure(cell)
        kept = [n for n, row in enumerate(rows) if row in set(cut(cell))]
        return [rows[n] for n in kept], measured_S[kept]

    return of


def blind(cell: Cell) -> list[int]:
    """Subsets that no score chose."""
    return [n for n, subset in enumerate(cell["subsets"]) if subset["design"] in {"random", "mixture"}]


def by_checkpoint(cells: Sequence[Cell]) -> None:
    measures, rows = kinds_of_update(cells), []
    for name in SHOWN:
        row = [name]
        for measure in measures.values():
            for trained in (False, True):
                some = [cell for cell in cells if cell["trained"] == trained]
                row.append(" ".join(f"{spearman(a, b):.2f}" for a, b in pairs(some, name, measure)))
        rows.append(row)
    head = ["score", *(f"{name}, {where}" for name in measures for where in ("start", "trained"))]
    table(head, rows, "Spearman by checkpoint, one number per seed")


def top_tenths(cells: Sequence[Cell]) -> None:
    """What the top tenth of each score gains, in hundredths of the mean reward; a column for each cell."""
    columns_of = [(name, measure, cell) for name, measure in kinds_of_update(cells).items() for cell in cells]
    tops = [s["name"] for s in cells[0]["subsets"] if s["design"].startswith("tenth 1/")]
    rows = []
    for name in [*tops, "random"]:
        row = [name.removesuffix(", tenth 1")]
        for _, measure, cell in columns_of:
            members, measured_S = measure(cell)
            labels = [cell["subsets"][n] for n in members]
            hits = [n for n, s in enumerate(labels) if name in {s["name"], s["design"]}]
            row.append(f"{100 * float(measured_S[hits].mean()):.1f}")
        facts = [s["facts"] for cell in cells for s in cell["subsets"] if name in {s["name"], s["design"]}]
        rows.append(row + [f"{np.mean([f[key] for f in facts]):.2f}" for key in ("target", "mislabelled", "no_signal")])
    rows.sort(key=lambda row: -float(row[1]))
    head = [f"{name}, {cell_name(cell)}" for name, _, cell in columns_of]
    table(
        ["top tenth of", *head, "of target families", "mislabelled", "no signal"],
        rows,
        "Gain of the chosen tenth, x 100",
    )
    for kind in ("sgd", "adam"):
        errors = np.concatenate([held_out_errors(cell, kind) for cell in cells])
        print(f"\nStandard error of a change, {kind}: median {np.median(errors):.4f}, largest {errors.max():.4f}.")
    starts = [
        f"{cell_name(c)} {np.mean([v for k, v in c['start'].items() if k.startswith('held-out')]):.3f}" for c in cells
    ]
    print(f"\nMean reward before: {', '.join(starts)}.")


def held_out_errors(cell: Cell, kind: str) -> np.ndarray:
    """Standard errors from sampling of the mean change over the targets."""
    errors_SV = np.array(next_move(cell, kind, RATE)["errors"])[:, columns(cell, "held-out")]
    return np.sqrt((errors_SV**2).sum(axis=1)) / errors_SV.shape[1]


def cell_name(cell: Cell) -> str:
    return f"{'trained' if cell['trained'] else 'start'} {cell['seed']}"


def chain(cells: Sequence[Cell]) -> None:
    """Where a prediction is lost: stored scores, then the update's own gradient, then the objective's own slope."""
    rows = []
    ways = (("sgd", "constant std/other dot"), ("adam", "constant std/other dot adam"))
    rates = sorted({m["rate"] for m in cells[0]["moves"]})
    for (kind, name), rate, trained in product(ways, rates, (False, True)):
        some = [cell for cell in cells if cell["trained"] == trained]
        share = np.mean([np.mean(next_move(cell, kind, rate)["effective_share"]) for cell in some])
        for label, predict in (
            ("stored scores", lambda c, k=kind, r=rate, n=name: stored_prediction(c, k, r, n)),
            ("fresh gradient, stored direction", lambda c, k=kind, r=rate: first_order(c, k, r, "stored", "held-out")),
            ("fresh gradient, objective's slope", lambda c, k=kind, r=rate: first_order(c, k, r, "sample", "held-out")),
        ):
            both = [(predict(cell), move(kind, rate)(cell)[1]) for cell in some]
            unseen = [(a[blind(cell)], b[blind(cell)]) for (a, b), cell in zip(both, some, strict=True)]
            where = "trained" if trained else "start"
            slopes = [text(slope(both)), text(slope(unseen))]
            rows.append([kind, f"{rate:g}", where, label, text(rank_agreement(both)), *slopes, f"{share:.2f}"])
    head = [
        "update",
        "rate",
        "at",
        "predicted by",
        "Spearman",
        "slope",
        "slope, random and mixtures",
        "effective share",
    ]
    table(head, rows, "Calibration on held-out prompts")


def next_move(cell: Cell, kind: str, rate: float) -> dict[str, Any]:
    return next(m for m in cell["moves"] if m["kind"] == kind and m["rate"] == rate)


def stored_prediction(cell: Cell, kind: str, rate: float, name: str) -> np.ndarray:
    step = next_move(cell, kind, rate)["step"] * cell["reward_units"]
    return step * score(cell, name, range(len(cell["subsets"])))


def first_order(cell: Cell, kind: str, rate: float, side: str, where: str) -> np.ndarray:
    found = np.array(cell["first_order"][kind][side])
    return next_move(cell, kind, rate)["step"] * (found[:, columns(cell, where)] if side == "sample" else found).mean(
        axis=1
    )


def repeats(cells: Sequence[Cell]) -> None:
    """Two independent draws of the update's completions: what noise of the update leaves of any prediction."""
    rows = []
    for kind in ("sgd", "adam"):
        found = []
        for cell in cells:
            held, order = columns(cell, "held-out"), cell["first_order"]
            one = np.array(order[kind]["sample"])[blind(cell)][:, held].mean(axis=1)
            found.append((one, np.array(order[f"{kind} again"]["sample"])[:, held].mean(axis=1)))
        rows.append([kind, text(rank_agreement(found))])
    table(["update", "Spearman"], rows, "Two draws of the same update, random subsets and mixtures (first order)")


def single_prompts(cells: Sequence[Cell]) -> None:
    cells = [cell for cell in cells if cell["prompts"]]
    rows = []
    for name in SHOWN:
        row = [name]
        for truth in ("many", "many adam"):
            found, base = (
                [(np.array(c["prompts"]["scores"][n]).mean(axis=1), held_out(c, truth)) for c in cells]
                for n in (name, BASE)
            )
            row += [text(rank_agreement(found)), "–" if name == BASE else text(difference(found, base), sign="+")]
        rows.append(row)
    ceiling = rank_agreement([(held_out(c, "few"), held_out(c, "many")) for c in cells])
    rows.append(["8 fresh completions, objective's slope", text(ceiling), "", "", ""])
    title = "Single prompts: Spearman with the first-order gain from 56 other completions, held-out"
    table(["score", "SGD", f"minus {BASE}", "Adam", f"minus {BASE}"], rows, title)


def held_out(cell: Cell, what: str) -> np.ndarray:
    return np.array(cell["prompts"][what])[:, columns(cell, "held-out")].mean(axis=1)


def sampling_check(cells: Sequence[Cell]) -> None:
    rows = []
    for cell in cells:
        found = cell["sampled"]
        weighted_SV = np.array(next_move(cell, "adam", found["step"])["changes"])[found["subsets"]]
        sampled_SV = np.array(found["changes"])
        gap_S = (sampled_SV - weighted_SV).mean(axis=1)
        numbers = (weighted_SV.mean(), sampled_SV.mean(), gap_S.mean(), gap_S.std(ddof=1))
        ranks = spearman(weighted_SV.mean(axis=1), sampled_SV.mean(axis=1))
        rows.append([cell_name(cell), *(f"{x:.3f}" for x in numbers), f"{ranks:.2f}"])
    head = ["cell", "by weights", "by sampling", "difference", "its spread over subsets", "Spearman"]
    table(head, rows, "Mean change by importance weights and by sampling, Adam, the largest step")


def draw(cells: Sequence[Cell], path: Path) -> None:
    mpl.rcParams |= {"svg.hashsalt": "cropi", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    figure = Figure(figsize=(9.6, 3.3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colours = {"random": "#8c8c8c", "mixture": "#0072b2", "tenth": "#d55e00"}
    for axes, side, title in (
        (left, "sample", "Fresh gradient, objective's slope"),
        (middle, None, "Stored scores (8 completions)"),
    ):
        for cell in cells:
            predicted_S = (
                first_order(cell, "adam", RATE, side, "held-out")
                if side
                else stored_prediction(cell, "adam", RATE, "constant std/other dot adam")
            )
            measured_S = move("adam")(cell)[1]
            for design, colour in colours.items():
                rows = [n for n, s in enumerate(cell["subsets"]) if s["design"].split()[0] == design]
                axes.scatter(predicted_S[rows], measured_S[rows], s=7, color=colour, alpha=0.6, linewidths=0)
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], color="#222222", linewidth=0.8)
        axes.set(title=title, xlabel="predicted change of mean reward", ylabel="measured" if side else None)
    for design, colour in colours.items():
        left.scatter(
            [], [], s=12, color=colour, label={"tenth": "tenths of scores", "mixture": "mixtures"}.get(design, design)
        )
    left.legend(frameon=False, loc="upper left")
    for cell in cells:
        tenths = [n for n, s in enumerate(cell["subsets"]) if s["name"].startswith(f"{BASE}, tenth")]
        style = {"color": "#d55e00" if cell["trained"] else "#0072b2", "linewidth": 1.2, "marker": "o", "markersize": 3}
        label = ("trained" if cell["trained"] else "start") if cell["seed"] == 0 else None
        right.plot(range(1, len(tenths) + 1), move("adam")(cell)[1][tenths], label=label, **style)
    right.axhline(0, color="#222222", linewidth=0.8)
    right.set(title=f"Tenths by {BASE}", xlabel="tenth of the pool, best first", ylabel="measured")
    right.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("figure", type=Path)
    options = parser.parse_args()
    cells = json.loads(options.measured.read_text(encoding="utf-8"))["cells"]
    agreements(cells, "Spearman of score and measured change on held-out prompts, all subsets")
    agreements(cells, "The same over random subsets and mixtures alone", blind)
    by_checkpoint(cells)
    top_tenths(cells)
    chain(cells)
    repeats(cells)
    single_prompts(cells)
    sampling_check(cells)
    draw(cells, options.figure)


if __name__ == "__main__":
    main()
