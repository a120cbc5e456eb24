"""The tables of a comparison: speed-ups, accuracies, differences, costs to fixed levels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cropi.lab.compare.report.labels import (
    UNITS,
    accuracy,
    code,
    gap,
    large,
    no_gain,
    part,
    reached,
    scenario_label,
    speedup,
)
from cropi.lab.compare.report.runs_data import MEASURES, SUITE, Comparison, interval
from cropi.report.blocks import Block, Table, Text
from cropi.report.wording import ABSENT, seconds, significant

Entry = Mapping[str, Any]
OPEN_SCENARIOS = 2  # with more of them, the tables by scenario are folded

SPEED_CAPTION = (
    "Speed-up: how many times sooner {target}'s own final targeted accuracy is reached, geometric mean over seeds "
    "(and scenarios). `<`: an upper bound, because some runs never reached it. Reached: share of the runs that did, of "
    "how many. No gain: share of the runs in which {target} ends no higher than the base policy (ratio 1 for all). "
    "Tokens: generated ones."
)


def speedups(comparison: Comparison) -> list[Block]:
    """Speed-ups with intervals."""
    if not any(entry["speedup"] for entry in comparison.summary["entries"]):
        return [Text(f"Without {code(comparison.summary['target'])} there is no target, and no speed-up.")]
    caption = SPEED_CAPTION.format(target=code(comparison.summary["target"]))
    header = ["steps", "tokens", "FLOPs", "seconds", "reached", "no gain"]
    return list(_tables(comparison, (caption, "Speed-up"), header, _speed_row))


def _speed_row(entry: Entry) -> list[str]:
    cells = [speedup(entry, measure) for measure in MEASURES]
    share = reached(entry)
    return [*cells, ABSENT if share is None else f"{part(share)} of {entry['seeds']}", part(no_gain(entry))]


def accuracies(comparison: Comparison) -> list[Block]:
    """Final accuracies and areas, and their differences from every reference."""
    header = ["targeted", "untargeted", "area (steps)", "area (FLOPs)"]
    summary = comparison.summary
    caption = (
        "Targeted and untargeted accuracy at the end of the run. Area: mean targeted accuracy over the run, by steps, "
        f"and by FLOPs up to {code(summary['target'])}'s total."
    )
    words = caption, "Accuracy and area"
    blocks: list[Block] = list(_tables(comparison, words, header, lambda e: [accuracy(i) for i in _four(e)]))
    for reference in summary["references"]:
        text = f"Difference from {code(reference)}"
        caption = f"{text}, on the same seeds and questions."
        shown = reference in (summary["target"], summary["best_reference"])
        blocks += _tables(comparison, (caption, text), header, _difference_row(reference), reference, shown)
    return blocks


def _difference_row(reference: str) -> Callable[[Entry], list[str]]:
    return lambda entry: [gap(found) for found in _four(entry["against"][reference])]


def _four(where: Mapping[str, Any]) -> list[Any]:
    final, area = where["final"], where["area"]
    found = (final.get("targeted"), final.get("untargeted"), area.get("steps"), area.get("flops"))
    return [interval(value) for value in found]


def levels(comparison: Comparison) -> list[Block]:
    """Mean costs up to the target and to every level that was asked for."""
    rows = [
        [scenario_label(e["scenario"]), e["strategy"], level, part(goal["reached"]), *_costs(goal)]
        for scenario in _scopes(comparison)
        for e in comparison.entries(scenario).values()
        for level, goal in e["to"].items()
    ]
    if not rows:
        return []
    caption = (
        f"Mean cost up to a targeted accuracy (`target`: the final one of {code(comparison.summary['target'])}); a run "
        "that never gets there counts with its end."
    )
    header = ["scenario", "strategy", "accuracy", "reached", *(UNITS[measure] for measure in MEASURES)]
    return [Table(caption, header, rows, left=2, collapsed=True)]


def _costs(goal: Mapping[str, Any]) -> Iterator[str]:
    forms: dict[str, Callable[[float], str]] = {
        "steps": significant,
        "tokens": large,
        "flops": large,
        "seconds": seconds,
    }
    for measure in MEASURES:
        found, form = goal[measure], forms[measure]
        yield f"{form(found['mean'])} [{form(found['low'])}, {form(found['high'])}]"


def _scopes(comparison: Comparison) -> list[str]:
    """The suite where there is more than one scenario, then every scenario."""
    return [*([SUITE] if len(comparison.scenarios) > 1 else []), *comparison.scenarios]


def _tables(
    comparison: Comparison,
    captions: tuple[str, str],
    header: list[str],
    row: Callable[[Entry], list[str]],
    but: str | None = None,
    shown: bool = True,
) -> Iterator[Table]:
    """A table over the suite and one of all scenarios (`captions`: whole and short), without the strategy `but`.

    The row of the main strategy is stressed. Folded where not `shown`, and by scenario where there are many.
    """
    caption, short = captions
    whole = "" if comparison.scope != SUITE else " All scenarios, each with the same weight."
    entries = [entry for name, entry in comparison.entries(comparison.scope).items() if name != but]
    rows = [[entry["strategy"], *row(entry)] for entry in entries]
    strong = next((n for n, entry in enumerate(entries) if entry["strategy"] == comparison.main), None)
    if rows:
        yield Table(caption + whole, ["strategy", *header], rows, strong=strong, collapsed=not shown)
    if comparison.scope == SUITE:
        parts = [e for s in comparison.scenarios for name, e in comparison.entries(s).items() if name != but]
        rows = [[entry["scenario"], entry["strategy"], *row(entry)] for entry in parts]
        folded = not shown or len(comparison.scenarios) > OPEN_SCENARIOS
        yield Table(f"{short}, by scenario.", ["scenario", "strategy", *header], rows, left=2, collapsed=folded)
