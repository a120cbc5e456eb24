"""The report of `cropi compare`: one self-contained page, and the same in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cropi.artifacts import write_text
from cropi.errors import printable
from cropi.lab.compare.report.curves import bands
from cropi.lab.compare.report.findings import caveats, lead
from cropi.lab.compare.report.labels import code, plus
from cropi.lab.compare.report.methods import limits, method, provenance
from cropi.lab.compare.report.phases import costs
from cropi.lab.compare.report.plots import (
    LABEL,
    Styles,
    accuracy_curves,
    selection_shares,
    speedup_intervals,
    styles,
)
from cropi.lab.compare.report.plots import similarities as draw_similarities
from cropi.lab.compare.report.runs_data import Comparison, damaged, read_comparison
from cropi.lab.compare.report.selected import (
    TFIDF,
    Chosen,
    Encoder,
    Similarity,
    SourceShares,
    read_chosen,
    similarities,
    source_shares,
)
from cropi.lab.compare.report.tables import accuracies, levels, speedups
from cropi.report.blocks import Block, Picture, Section, Table, Text
from cropi.report.drawing import shortened, thinned
from cropi.report.markdown import markdown
from cropi.report.report import html
from cropi.report.wording import ABSENT, decimal, listed, percent

CURVES = {"steps": "optimiser steps", "flops": "FLOPs", "seconds": "seconds"}
MAX_STAGES = 8  # columns of a table by stage
NO_RUNS = "The folders of the runs are not here, so this part is left out."


def make_comparison_report(folder: Path, main: str | None = None, encoder: Encoder | None = None) -> None:
    """Write `compare.html` and `compare.md` to a comparison's folder, from `results.parquet` and `compare.json`.

    What the strategies selected is read from the folders of the runs; where there are none, that part is left out and
    said to be. `main` is the strategy that the headline is about; unset, the one with the largest area that is no
    reference, with a warning that it was chosen so. `encoder` gives the embeddings of the similarity analysis; unset,
    TF-IDF. The same folder gives the same bytes. Raises ArtifactError where a file is missing or damaged.
    """
    comparison = read_comparison(folder, main)
    try:
        parts = sections(comparison, encoder)
    except (LookupError, TypeError, ValueError) as error:
        raise damaged(folder / "compare.json", error) from error
    title = "cropi compare: strategies at equal cost"
    write_text(folder / "compare.html", printable(html(title, parts)))
    write_text(folder / "compare.md", printable(markdown(title, parts)))


def sections(comparison: Comparison, encoder: Encoder | None) -> list[Section]:
    """The report, in order."""
    if not comparison.scenarios:
        return [Section("Result", [Text("No run is finished yet.", lead=True)])]
    looks = styles(comparison.strategies)
    chosen = {name: read_chosen(comparison, name) for name in comparison.scenarios}
    return [
        Section("Result", [Text(lead(comparison), lead=True), Text(caveats(comparison))]),
        Section("Speed-up", [*_speedup_figure(comparison, looks), *speedups(comparison)]),
        Section("Accuracy", accuracies(comparison)),
        Section("Learning curves", [*_curves(comparison, looks), *levels(comparison)]),
        Section("Cost", costs(comparison)),
        Section("What was selected", _selected(chosen)),
        Section("Similarity to the validation sets", _similar(comparison, chosen, encoder, looks)),
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
    alike: list[str] = []
    for number, (scenario, found) in enumerate(chosen.items()):
        if not found.choosing:
            continue
        shares = source_shares(found)
        if len(shares.sources) == 1:
            alike.append(code(scenario))
            continue
        drawn = selection_shares(shares.sources, shares.pool.tolist(), shares.strategies, str(number))
        caption = (
            f"{code(scenario)}: share of each source in the pool and in every stage's selection; darker is larger."
        )
        blocks += [Picture(drawn, caption)] if drawn else []
        rows += _share_rows(scenario, shares)
    blocks += [Text(f"The pool has one source only in {listed(alike)}.")] if alike else []
    if not rows:
        return blocks or [Text(_why_nothing(chosen))]
    intro = "Strategies that take the whole pool are left out: their column would be the pool's."
    header = ["scenario", "source", "strategy", "pool", "first stage", "last stage", "mean of stages"]
    table = Table("Shares in %, mean over seeds.", header, rows, left=3, collapsed=True)
    return [Text(intro), *blocks, table]


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


def _similar(
    comparison: Comparison, chosen: Mapping[str, Chosen], encoder: Encoder | None, looks: Styles
) -> list[Block]:
    found = {
        scenario: [one for one in similarities(own, encoder) if one.strategies]
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
    name = TFIDF if encoder is None else f"embeddings of {code(encoder.name)}, mean over tokens"
    caption = (
        f"Mean cosine of the selected prompts with those of a validation set ({name}), by stage; mean over seeds, "
        "bands from the lowest to the highest seed. Dotted: the whole pool. It tells how alike the texts are, not how "
        "useful they are."
    )
    return [*([Picture(drawn, caption)] if drawn else []), _similarity_table(found, name)]


def _similarity_table(found: Mapping[str, Sequence[Similarity]], name: str) -> Table:
    everything = [(scenario, one) for scenario, several in found.items() for one in several]
    stages = thinned(range(max(v.shape[1] for _, one in everything for v in one.strategies.values())), MAX_STAGES)
    rows = []
    for scenario, one in everything:
        pool = float(one.pool.mean())
        for strategy, values_SG in one.strategies.items():
            means_G = values_SG.mean(axis=0)
            cells = [decimal(means_G[g], 3) if g < len(means_G) else ABSENT for g in stages]
            row = [scenario, one.validation_set, strategy, decimal(pool, 3), *cells]
            rows.append([*row, plus(float(means_G.mean()) - pool)])
    header = ["scenario", "validation set", "strategy", "pool", *(f"stage {g}" for g in stages), "mean − pool"]
    return Table(f"Mean cosine ({name}), mean over seeds.", header, rows, left=3, collapsed=len(rows) > 12)
