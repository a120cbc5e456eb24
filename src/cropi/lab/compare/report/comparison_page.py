"""The report of a comparison: one self-contained page, the same in Markdown, and a summary for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cropi.lab.compare.paired_runs import Comparison, interval
from cropi.lab.compare.report.accuracy_bands import bands
from cropi.lab.compare.report.compared_selections import (
    Chosen,
    Similarity,
    SourceShares,
    read_chosen,
    similarities,
    source_shares,
)
from cropi.lab.compare.report.comparison_figures import (
    LABEL,
    Styles,
    accuracy_curves,
    selection_shares,
    speedup_intervals,
    styles,
)
from cropi.lab.compare.report.comparison_figures import similarities as draw_similarities
from cropi.lab.compare.report.comparison_tables import accuracies, cost_to_target, costs, levels, speedups
from cropi.lab.compare.report.method_notes import limits, method, provenance
from cropi.lab.compare.report.ratio_format import HEADLINE_MEASURES, UNITS, censored, ratio_interval, reached
from cropi.report.blocks import Block, Picture, Section, Table, Text
from cropi.report.drawing import shortened, thinned
from cropi.report.markdown import text_table
from cropi.report.rendering import write_report
from cropi.report.wording import ABSENT, code, decimal, listed, percent, signed

CURVES = {"steps": "optimiser steps", "flops": "FLOPs", "seconds": "seconds"}
MAX_STAGES = 8  # columns of a table by stage
NO_RUNS = "The folders of the runs are not here, so this part is left out."
NOTHING = "No run is finished yet."


def write_comparison_report(comparison: Comparison) -> None:
    """Write `compare.html` and `compare.md`. Selections are left out if the folders of the runs are not here."""
    write_report(comparison.folder, "compare", "cropi compare: strategies at equal cost", sections(comparison))


def terminal_text(comparison: Comparison) -> str:
    """The headline, the cost to reach the target, speed-ups of several strategies, and areas over drawn scenarios."""
    if not comparison.scenarios:
        return NOTHING
    tables = [cost_to_target(comparison)]
    if len(comparison.strategies) > 2:
        tables += [block for block in speedups(comparison)[:1] if isinstance(block, Table)]
    if comparison.summary["population"]:
        tables += [block for block in accuracies(comparison) if isinstance(block, Table) and not block.collapsed]
    step, unfinished = comparison.summary["up_to_step"], comparison.summary["unfinished"]
    notes = [] if step is None else [f"Results up to step {step}; unfinished runs are included."]
    notes += [f"{len(unfinished)} scenarios wait for some strategy and are left out."] if unfinished else []
    shown = [text_table(table) for table in tables if table is not None]
    return "\n\n".join([headline(comparison).replace("`", ""), *notes, *shown])


def sections(comparison: Comparison) -> list[Section]:
    """The report, in order."""
    if not comparison.scenarios:
        return [Section("Result", [Text(NOTHING, lead=True)])]
    looks = styles(comparison.strategies)
    chosen = {name: read_chosen(comparison, name) for name in comparison.scenarios}
    target = cost_to_target(comparison)
    result: list[Block] = [Text(headline(comparison), lead=True), *([target] if target else [])]
    return [
        Section("Result", result),
        Section("Speed-up", [*_speedup_figure(comparison, looks), *speedups(comparison)]),
        Section("Accuracy", accuracies(comparison)),
        Section("Learning curves", [*_curves(comparison, looks), *levels(comparison)]),
        Section("Cost", costs(comparison)),
        Section("What was selected", _selected(chosen)),
        Section("Similarity to the validation sets", _similar(comparison, chosen, looks)),
        Section("Method", method(comparison)),
        Section("Limits", limits(comparison)),
        Section("Where the numbers come from", provenance(comparison)),
    ]


def _speedup_figure(comparison: Comparison, looks: Styles) -> list[Block]:
    drawn = speedup_intervals(comparison, looks)
    level = percent(comparison.summary["confidence"])
    ticks = " Ticks: single scenarios." if len(comparison.scenarios) > 1 else ""
    caption = (
        f"Speed-up with its {level} interval; right of 1 is sooner than {code(comparison.summary['target'])}. Hollow: "
        f"an upper bound, some runs never reached the target.{ticks}"
    )
    return [Picture(drawn, caption)] if drawn else []


def _curves(comparison: Comparison, looks: Styles) -> list[Block]:
    blocks: list[Block] = []
    level, target = percent(comparison.summary["confidence"]), comparison.summary["target"]
    found = {name: bands(comparison, name, CURVES) for name in comparison.scenarios}
    for measure, words in CURVES.items():
        shown = {name: of_measures[measure] for name, of_measures in found.items() if of_measures}
        if drawn := accuracy_curves(shown, measure, looks, comparison.main, target):
            ends = "" if measure == "steps" else " A curve ends where the cheapest of its runs does."
            caption = (
                f"Targeted accuracy against {words}, mean over seeds. Bands: {level} intervals over seeds and "
                f"questions. Dotted: where {code(target)} ends, if it was run."
            )
            blocks.append(Picture(drawn, caption + ends))
    return blocks or [Text("No test set is targeted.")]


# -- selections --------------------------------------------------------------------------------------------------------


def _selected(chosen: Mapping[str, Chosen]) -> list[Block]:
    blocks: list[Block] = []
    rows: list[list[str]] = []
    for number, (scenario, found) in enumerate(chosen.items()):
        if not found.choosing:
            continue
        shares = source_shares(found)
        drawn = selection_shares(shares.sources, shares.pool.tolist(), shares.strategies, str(number))
        caption = (
            f"{code(scenario)}: share of each source in the pool and in every stage's selection; darker is larger. "
            "Strategies that take the whole pool are left out."
        )
        blocks += [Picture(drawn, caption)] if drawn else []
        rows += _share_rows(scenario, shares)
    if not rows:
        return [Text(_why_nothing(chosen))]
    header = ["scenario", "source", "strategy", "pool", "first stage", "last stage", "mean of stages"]
    return [*blocks, Table("Shares in %, mean over seeds.", header, rows, left=3, collapsed=True)]


def _why_nothing(chosen: Mapping[str, Chosen]) -> str:
    return "Every strategy takes the whole pool." if any(found.pools for found in chosen.values()) else NO_RUNS


def _share_rows(scenario: str, shares: SourceShares) -> list[list[str]]:
    return [
        [scenario, source, strategy, *(f"{100 * value:.1f}" for value in (shares.pool[place], *_ends(values[place])))]
        for place, source in enumerate(shares.sources)
        for strategy, values in shares.strategies.items()
    ]


def _ends(by_stage: np.ndarray) -> tuple[float, float, float]:
    return by_stage[0], by_stage[-1], float(by_stage.mean())


# -- similarity --------------------------------------------------------------------------------------------------------


def _similar(comparison: Comparison, chosen: Mapping[str, Chosen], looks: Styles) -> list[Block]:
    found = {
        scenario: [one for one in similarities(own) if one.strategies]
        for scenario, own in chosen.items()
        if own.choosing
    }
    if not any(found.values()):
        return [Text(_why_nothing(chosen))]
    panels = [
        {
            "title": f"{shortened(scenario, LABEL)}: {shortened(one.validation_set, LABEL)}",
            "pool": float(one.pool.mean()),
            "strategies": one.strategies,
        }
        for scenario, several in found.items()
        for one in several
    ]
    drawn = draw_similarities(panels, looks, comparison.main)
    caption = (
        "Mean TF-IDF cosine of the selected prompts with those of a validation set, by stage; mean over seeds, bands "
        "from the lowest to the highest seed. Dotted: the whole pool. It shows how alike the texts are, not how useful."
    )
    return [*([Picture(drawn, caption)] if drawn else []), _similarity_table(found)]


def _similarity_table(found: Mapping[str, Sequence[Similarity]]) -> Table:
    everything = [(scenario, one) for scenario, several in found.items() for one in several]
    stages = thinned(range(max(v.shape[1] for _, one in everything for v in one.strategies.values())), MAX_STAGES)
    rows = []
    for scenario, one in everything:
        pool = float(one.pool.mean())
        for strategy, values_SG in one.strategies.items():
            means_G = values_SG.mean(axis=0)
            cells = [decimal(means_G[g], 3) if g < len(means_G) else ABSENT for g in stages]
            row = [scenario, one.validation_set, strategy, decimal(pool, 3), *cells]
            rows.append([*row, signed(float(means_G.mean()) - pool, 3)])
    header = ["scenario", "validation set", "strategy", "pool", *(f"stage {g}" for g in stages), "mean − pool"]
    return Table("Mean TF-IDF cosine, mean over seeds.", header, rows, left=3, collapsed=len(rows) > 12)


def headline(comparison: Comparison) -> str:
    """Say how much sooner the main strategy reaches the target's accuracy, and how sure that is."""
    main, entries = comparison.main, comparison.entries(comparison.scope)
    if main is None or main not in entries:
        names = listed([code(name) for name in comparison.strategies])
        return f"Only {names}: there is nothing to compare."
    entry, target = entries[main], code(comparison.summary["target"])
    known = {m: found for m in HEADLINE_MEASURES if (found := interval(entry["speedup"].get(m))) is not None}
    if not known and comparison.summary["target"] in entries:
        return f"{target} gains nothing here, so there is no target and no speed-up."
    if not known:
        return f"{target} was not run, so there is no target and no speed-up."
    if censored(entry):
        missed = percent(1 - (reached(entry) or 0.0))
        ratios = listed([f"{ratio_interval(found)}× in {UNITS[measure]}" for measure, found in known.items()])
        return (
            f"{code(main)} never reached the final accuracy of {target} in {missed} of its runs. Its speed-up is at "
            f"most {ratios}."
        )
    ratios = listed([f"{ratio_interval(found)}× fewer {UNITS[measure]}" for measure, found in known.items()])
    return (
        f"{code(main)} reaches the final accuracy of {target} with {ratios}, including rollouts and scoring. "
        f"{_certainty(comparison)}"
    )


def _certainty(comparison: Comparison) -> str:
    level = percent(comparison.summary["confidence"])
    counts = [entry["seeds"] for name in comparison.scenarios for entry in comparison.entries(name).values()]
    if max(counts) == 1 and not comparison.summary["population"]:
        return f"One seed: the {level} intervals cover the choice of questions, not of seeds."
    over = "scenarios" if comparison.summary["population"] else "seeds and questions"
    span = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"Scenarios: {len(comparison.scenarios)}; seeds of each: {span}; {level} intervals over {over}."
