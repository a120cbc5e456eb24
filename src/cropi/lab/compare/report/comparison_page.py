"""The report of a comparison: one self-contained page, the same in Markdown, and a summary for the terminal."""

from __future__ import annotations

from cropi.lab.compare.paired_runs import SUITE, Comparison, interval
from cropi.lab.compare.report.accuracy_bands import bands, population_bands
from cropi.lab.compare.report.compared_selections import compared_sources, selected_by_strategy
from cropi.lab.compare.report.comparison_figures import Styles, accuracy_curves, speedup_intervals, styles
from cropi.lab.compare.report.comparison_tables import (
    accuracies,
    cost_to_target,
    costs,
    large_numbers,
    levels,
    speedups,
)
from cropi.lab.compare.report.method_notes import limits, method, provenance
from cropi.lab.number_format import HEADLINE_MEASURES, UNITS, censored, code, listed, ratio_interval, reached
from cropi.report.blocks import Block, Numbers, Picture, Section, Table, Text, text_table
from cropi.report.choosing import share_table
from cropi.report.rendering import write_report
from cropi.report.wording import percent

MAX_CURVES = 12  # scenarios of one's own whose curves are drawn: more would make the page too large to be sent around
CURVES = {"steps": "optimiser steps", "flops": "FLOPs", "seconds": "seconds"}
NO_RUNS = "The folders of the runs are not here, so this part is left out."
NOTHING = "No run is finished yet."


def write_comparison_report(comparison: Comparison) -> None:
    """Write `compare.html` and `compare.md`. Selections are left out if the folders of the runs are not here."""
    write_report(comparison.folder, "compare", "cropi compare: strategies at equal cost", sections(comparison))


def terminal_text(comparison: Comparison) -> str:
    """The headline and the cost to reach the target; of several strategies, or drawn scenarios, speed-ups and areas."""
    if not comparison.scenarios:
        return NOTHING
    tables = [cost_to_target(comparison)]
    several = len(comparison.strategies) > 2
    if several:
        tables += [block for block in speedups(comparison)[:1] if isinstance(block, Table)]
    if several or comparison.summary["population"]:
        tables += [block for block in accuracies(comparison) if isinstance(block, Table) and not block.collapsed]
    step, unfinished = comparison.summary["up_to_step"], comparison.summary["unfinished"]
    notes = [] if step is None else [f"Results up to step {step}; unfinished runs are included."]
    notes += (
        [f"{len(unfinished)} scenarios wait for some strategy and are left out of the means."] if unfinished else []
    )
    shown = [text_table(table) for table in tables if table is not None]
    return "\n\n".join([headline(comparison).replace("`", ""), *notes, *shown])


def sections(comparison: Comparison) -> list[Section]:
    """The report, in order."""
    if not comparison.scenarios:
        return [Section("Result", [Text(NOTHING, lead=True)])]
    looks = styles(comparison.strategies)
    target, (first, *curves) = cost_to_target(comparison), _curves(comparison, looks)
    result: list[Block] = [Numbers(large_numbers(comparison)), first, Text(headline(comparison), lead=True)]
    return [
        Section("Result", [*result, *([target] if target else [])]),
        Section("Speed-up", [*_speedup_figure(comparison, looks), *speedups(comparison)]),
        Section("Accuracy", accuracies(comparison)),
        Section("Learning curves by cost", [*curves, *levels(comparison)]),
        Section("Cost", costs(comparison)),
        Section("What was selected", _selected(comparison)),
        Section("Method", method(comparison)),
        Section("Limits", limits(comparison)),
        Section("Where the numbers come from", provenance(comparison)),
    ]


def _speedup_figure(comparison: Comparison, looks: Styles) -> list[Block]:
    drawn = speedup_intervals(comparison, looks)
    level = percent(comparison.summary["confidence"])
    ticks = " Ticks: single scenarios." if len(comparison.scenarios) > 1 else ""
    caption = (
        f"Speed-up with its {level} interval. Right of 1 is sooner than {code(comparison.summary['target'])}. Hollow: "
        f"an upper bound, some runs never reached the target.{ticks}"
    )
    return [Picture(drawn, caption)] if drawn else []


def _curves(comparison: Comparison, looks: Styles) -> list[Block]:
    blocks: list[Block] = []
    level, target = percent(comparison.summary["confidence"]), comparison.summary["target"]
    if comparison.summary["population"]:
        found = {f"{len(comparison.scenarios)} drawn scenarios": population_bands(comparison, CURVES)}
        over, rest = "scenarios", " Single scenarios are in the tables."
    else:
        found = {name: bands(comparison, name, CURVES) for name in comparison.scenarios[:MAX_CURVES]}
        left_out = len(comparison.scenarios) - len(found)
        rest = f" The other {left_out} scenarios are only in the tables." if left_out else ""
        over = "seeds and questions"
    for measure, words in CURVES.items():
        shown = {name: of_measures[measure] for name, of_measures in found.items() if of_measures}
        ends = "" if measure == "steps" else " A curve ends where the cheapest of its runs does."
        caption = (
            f"Targeted accuracy against {words}, mean over {over.split()[0]}. Bands: {level} intervals over {over}. "
            f"Dotted: where {code(target)} ends, if it was run.{ends}{rest}"
        )
        if shown:
            blocks.append(accuracy_curves(shown, measure, looks, comparison.main, target, caption))
    return blocks or [Text("No test set is targeted.")]


# -- selections --------------------------------------------------------------------------------------------------------


def _selected(comparison: Comparison) -> list[Block]:
    read = {name: selected_by_strategy(comparison, name) for name in comparison.scenarios}
    tables: list[Block] = [
        share_table(columns, f"{code(name)}: prompts by source, of the pool and of all stages, summed over seeds.")
        for name, by_strategy in read.items()
        if (columns := compared_sources(by_strategy))
    ]
    return tables or [Text("Every strategy takes the whole pool." if any(read.values()) else NO_RUNS)]


def headline(comparison: Comparison) -> str:
    """Say how much sooner the main strategy reaches the target's accuracy, and how sure that is."""
    main, entries = comparison.main, comparison.entries(comparison.scope)
    if not entries:
        return "No scenario has runs of all strategies, so there is nothing to compare."
    if main is None or main not in entries:
        names = listed([code(name) for name in comparison.strategies])
        return f"Only {names}: there is nothing to compare."
    entry, target = entries[main], code(comparison.summary["target"])
    known = {m: found for m in HEADLINE_MEASURES if (found := interval(entry["speedup"].get(m))) is not None}
    if not known and comparison.summary["target"] in entries:
        return f"{target} gains nothing here, so there is no target and no speed-up."
    if not known:
        return f"{target} was not run, so there is no target and no speed-up."
    every, what = (entry["scenarios"], "scenarios") if comparison.scope == SUITE else (entry["seeds"], "runs")
    few = "" if entry["gaining"] == every else f" A speed-up is known in {entry['gaining']} of {every} {what}."
    if censored(entry):
        missed = percent(1 - (reached(entry) or 0.0))
        ratios = listed([f"{ratio_interval(found)}× in {UNITS[measure]}" for measure, found in known.items()])
        return (
            f"{code(main)} never reached the final accuracy of {target} in {missed} of its runs. Its speed-up is at "
            f"most {ratios}.{few}"
        )
    ratios = listed([f"{ratio_interval(found)}× fewer {UNITS[measure]}" for measure, found in known.items()])
    return (
        f"{code(main)} reaches the final accuracy of {target} with {ratios}. Rollouts and scoring are included. "
        f"{_certainty(comparison)}{few}"
    )


def _certainty(comparison: Comparison) -> str:
    level = percent(comparison.summary["confidence"])
    counts = [entry["seeds"] for name in comparison.scenarios for entry in comparison.entries(name).values()]
    if max(counts) == 1 and not comparison.summary["population"]:
        return f"One seed: the {level} intervals cover the choice of questions, not of seeds."
    over = "scenarios" if comparison.summary["population"] else "seeds and questions"
    span = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"Scenarios: {len(comparison.scenarios)}; seeds of each: {span}; {level} intervals over {over}."
