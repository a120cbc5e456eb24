"""The tables of a comparison: speed-ups, accuracies, differences, costs to reach an accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cropi.lab.compare.comparison_summary import MIN_GAIN
from cropi.lab.compare.paired_runs import FLOPS, MEASURES, PHASES, SECONDS, SUITE, TOKENS, Comparison, interval
from cropi.lab.number_format import (
    HEADLINE_MEASURES,
    UNITS,
    Entry,
    censored,
    code,
    difference,
    large,
    no_gain,
    ratio,
    reached,
    scenario_label,
    speedup,
)
from cropi.report.blocks import Block, Picture, Table, Text
from cropi.report.figures import cost_split
from cropi.report.wording import ABSENT, bounds, decimal, percent, seconds, share, significant, tenths, with_interval

OPEN_SCENARIOS = 2  # with more of them, the tables by scenario are folded
COSTS: Mapping[str, Callable[[float], str]] = {
    "steps": significant,
    "tokens": large,
    "flops": large,
    "seconds": seconds,
}


def large_numbers(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Steps, FLOPs and seconds to the target's accuracy, as ratios; final accuracies where there is no speed-up."""
    target, main = comparison.summary["target"], comparison.main
    entries = comparison.entries(comparison.scope)
    if main in entries and entries[main]["speedup"] and target in entries:
        own, theirs = (entries[name]["to"]["target"] for name in (main, target))
        found = []
        for measure in HEADLINE_MEASURES:
            known, form = interval(entries[main]["speedup"][measure]), COSTS[measure]
            spent = f"{form(own[measure]['mean'])} against {form(theirs[measure]['mean'])}"
            bound = "≤ " if censored(entries[main]) else ""
            detail = f"{bounds(known, ratio)}; {spent}" if known else ABSENT
            found.append((f"fewer {UNITS[measure]}", f"{bound}{ratio(known.mean)}×" if known else ABSENT, detail))
        return found
    finals = {name: interval(entry["final"].get("targeted")) for name, entry in entries.items()}
    return [
        (f"targeted accuracy of {name}", decimal(found.mean), bounds(found, decimal))
        for name, found in list(finals.items())[:3]
        if found is not None
    ]


def cost_to_target(comparison: Comparison) -> Table | None:
    """Steps, FLOPs and seconds to the target's final accuracy, of the target and of the main strategy."""
    target, main = comparison.summary["target"], comparison.main
    entries = comparison.entries(comparison.scope)
    if main is None or main == target or target not in entries or not entries.get(main, {"speedup": {}})["speedup"]:
        return None
    own, theirs = (entries[name]["to"]["target"] for name in (main, target))
    rows = [
        [UNITS[m], COSTS[m](theirs[m]["mean"]), COSTS[m](own[m]["mean"]), speedup(entries[main], m)]
        for m in HEADLINE_MEASURES
    ]
    caption = (
        f"Mean cost to reach the final targeted accuracy of {code(target)}. Speed-up: geometric mean over runs in "
        f"which {code(target)} gains. A run that never gets there counts with its total cost; `<` marks a bound."
    )
    return Table(caption, [f"to {target}'s accuracy", target, main, "speed-up"], rows)


def speedups(comparison: Comparison) -> list[Block]:
    """Speed-ups with intervals."""
    target = code(comparison.summary["target"])
    if comparison.summary["target"] not in comparison.strategies:
        return [Text(f"Without {target} there is no target, and no speed-up.")]
    caption = (
        f"Speed-up: how many times sooner the final targeted accuracy of {target} is reached, geometric mean over "
        "seeds and scenarios. Reached: the share of runs that reached it. `<`: an upper bound, because some did not. "
        f"No gain: share of the runs in which {target} ends less than {MIN_GAIN} above the base policy. They have no "
        "speed-up. Tokens: generated ones."
    )
    header = ["steps", "tokens", "FLOPs", "seconds", "reached", "no gain"]
    return list(_tables(comparison, (caption, "Speed-up"), header, _speed_row))


def _speed_row(entry: Entry) -> list[str]:
    cells, share = [speedup(entry, measure) for measure in MEASURES], reached(entry)
    return [*cells, percent(share), f"{percent(no_gain(entry))} of {entry['counted']}"]


def accuracies(comparison: Comparison) -> list[Block]:
    """Final accuracies and areas, and their differences from every reference."""
    header = ["targeted", "untargeted", "area (steps)", "area (FLOPs)"]
    summary = comparison.summary
    caption = (
        "Accuracy at the end of the run, targeted and untargeted. Area: mean targeted accuracy over the run, by steps, "
        f"and by FLOPs up to the total of {code(summary['target'])}."
    )
    captions = caption, "Accuracy and area"
    blocks: list[Block] = [
        *_tables(comparison, captions, header, lambda entry: [with_interval(found, 3) for found in _four(entry)])
    ]
    drawn = summary["population"]
    for reference in summary["references"]:
        text = f"Difference from {code(reference)}"
        worst = " Worst tenth: mean area by FLOPs over the tenth of scenarios where it is lowest." if drawn else ""
        captions = f"{text}, on the same seeds and questions.{worst}", text
        shown = reference in (summary["target"], summary["best_reference"])
        columns, row = [*header, *(["worst tenth"] if drawn else [])], _difference_row(reference, drawn)
        blocks += _tables(comparison, captions, columns, row, reference, shown)
    return blocks


def _difference_row(reference: str, worst: bool) -> Callable[[Entry], list[str]]:
    def row(entry: Entry) -> list[str]:
        own = entry["against"][reference]
        found = [*_four(own), *([interval(own["area"].get("worst_tenth"))] if worst else [])]
        return [difference(value, 3) for value in found]

    return row


def _four(where: Mapping[str, Any]) -> list[Any]:
    final, area = where["final"], where["area"]
    found = (final.get("targeted"), final.get("untargeted"), area.get("steps"), area.get("flops"))
    return [interval(value) for value in found]


def levels(comparison: Comparison) -> list[Block]:
    """Mean costs to reach the target and every level that was asked for."""
    scopes = [*([SUITE] if len(comparison.scenarios) > 1 else []), *comparison.scenarios]
    rows = [
        [scenario_label(e["scenario"]), e["strategy"], level, percent(goal["reached"]), *_costs(goal)]
        for scenario in scopes
        for e in comparison.entries(scenario).values()
        for level, goal in e["to"].items()
        if "reached" in goal
    ]
    if not rows:
        return []
    caption = (
        f"Mean cost to reach a targeted accuracy (`target`: the final one of {code(comparison.summary['target'])}). A "
        "run that never gets there counts with its total cost."
    )
    header = ["scenario", "strategy", "accuracy", "reached", *(UNITS[measure] for measure in MEASURES)]
    return [Table(caption, header, rows, left=2, collapsed=True)]


def _costs(goal: Mapping[str, Any]) -> Iterator[str]:
    for measure in MEASURES:
        found, form = interval(goal[measure]), COSTS[measure]
        assert found is not None, "all measures have a cost"
        yield f"{form(found.mean)} {bounds(found, form)}"


def _tables(
    comparison: Comparison,
    captions: tuple[str, str],
    header: list[str],
    row: Callable[[Entry], list[str]],
    but: str | None = None,
    shown: bool = True,
) -> Iterator[Table]:
    """A table over the suite and one by scenario (`captions`: long and short); with `but`, of differences from it.

    The row of the main strategy is stressed. Tables are folded if not `shown`; by scenario also if there are many.
    """
    caption, short = captions
    first = "strategy" if but is None else f"less {but}"
    whole = "" if comparison.scope != SUITE else " All scenarios, each with the same weight."
    entries = [entry for name, entry in comparison.entries(comparison.scope).items() if name != but]
    rows = [[entry["strategy"], *row(entry)] for entry in entries]
    strong = next((n for n, entry in enumerate(entries) if entry["strategy"] == comparison.main), None)
    if rows:
        yield Table(caption + whole, [first, *header], rows, strong=strong, collapsed=not shown)
    if comparison.scope == SUITE:
        parts = [e for s in comparison.scenarios for name, e in comparison.entries(s).items() if name != but]
        rows = [[entry["scenario"], entry["strategy"], *row(entry)] for entry in parts]
        folded = not shown or len(comparison.scenarios) > OPEN_SCENARIOS
        yield Table(f"{short}, by scenario.", ["scenario", first, *header], rows, left=2, collapsed=folded)


KINDS = {"seconds": PHASES, "flops": ("collect", "score", "train")}
COST_NOTE = (
    "Trajectories that several strategies read count in full for each. Evaluation does not count. Selecting has no "
    "FLOPs: it multiplies no matrices. Seconds are those of this machine."
)


def costs(comparison: Comparison) -> list[Block]:
    """Bars and tables of the costs of whole runs, means over seeds and scenarios."""
    scope = comparison.scope
    names = [name for name in comparison.strategies if _total(comparison, scope, name, SECONDS) is not None]
    if not names:
        return [Text("No scenario has runs of all strategies.")]
    bars = {
        kind: {name: dict(zip(KINDS[kind], _known(comparison, scope, name, columns), strict=True)) for name in names}
        for kind, columns in (("seconds", SECONDS), ("flops", FLOPS))
    }
    drawn = cost_split(bars, "comparison-cost")
    where = "scenarios and seeds" if scope == SUITE else "seeds"
    caption = f"Cost of a whole run by phase, mean over {where}. Evaluation is left out."
    header = ["strategy", *PHASES, "total", "rest ÷ train", "generated tokens", "FLOPs"]
    rows = [_row(comparison, scope, name) for name in names]
    strong = names.index(comparison.main) if comparison.main in names else None
    blocks: list[Block] = [Picture(drawn, caption)] if drawn else []
    blocks.append(
        Table(
            f"Seconds of a whole run, mean over {where}. Rest: collect + score + select.", header, rows, strong=strong
        )
    )
    if scope == SUITE:
        parts = [
            [scenario, *_row(comparison, scenario, name)]
            for scenario in comparison.scenarios
            for name in comparison.entries(scenario)
        ]
        blocks.append(Table("The same by scenario.", ["scenario", *header], parts, left=2, collapsed=True))
    return [*blocks, Text(COST_NOTE)]


def _row(comparison: Comparison, scope: str, name: str) -> list[str]:
    seconds_4 = _known(comparison, scope, name, SECONDS)
    ahead = sum(seconds_4[:-1]) / seconds_4[-1] if seconds_4[-1] else None
    tokens, operations = (sum(_known(comparison, scope, name, columns)) for columns in (TOKENS, FLOPS))
    cells = [tenths(value) if value else "0" for value in (*seconds_4, sum(seconds_4))]
    return [name, *cells, share(ahead), large(tokens), large(operations)]


def _known(comparison: Comparison, scope: str, name: str, columns: Sequence[str]) -> list[float]:
    found = _total(comparison, scope, name, columns)
    assert found is not None, "only strategies with runs are shown"
    return found


def _total(comparison: Comparison, scope: str, name: str, columns: Sequence[str]) -> list[float] | None:
    """Costs of whole runs: the mean over seeds, and over the scenarios that all strategies share."""
    left_out = comparison.summary["unfinished"]
    scenarios = [s for s in comparison.scenarios if s not in left_out] if scope == SUITE else [scope]
    by_scenario = [
        np.mean([[trace.costs[column][-1] for column in columns] for trace in traces], axis=0)
        for scenario in scenarios
        if (traces := comparison.own_traces(scenario, name))
    ]
    return np.mean(by_scenario, axis=0).tolist() if by_scenario else None
