"""Costs of the runs of a comparison, by phase."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cropi.lab.compare.paired_runs import FLOPS, PHASES, SECONDS, SUITE, TOKENS, Comparison
from cropi.lab.compare.report.comparison_figures import cost_split
from cropi.report.blocks import Block, Picture, Table, Text
from cropi.report.wording import large, share, tenths

KINDS = {"seconds": PHASES, "flops": ("collect", "score", "train")}
NOTE = (
    "Trajectories that several strategies read count in full for each. Evaluation does not count. Selecting has no "
    "FLOPs: it multiplies no matrices. Seconds are those of this machine."
)


def costs(comparison: Comparison) -> list[Block]:
    """Bars and tables of the costs of whole runs, means over seeds and scenarios."""
    scope = comparison.scope
    names = [name for name in comparison.strategies if _total(comparison, scope, name, SECONDS) is not None]
    if not names:
        return [Text("There is no run whose cost is known.")]
    bars = {
        kind: {name: _known(comparison, scope, name, columns) for name in names}
        for kind, columns in (("seconds", SECONDS), ("flops", FLOPS))
    }
    drawn = cost_split(bars, KINDS)
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
    return [*blocks, Text(NOTE)]


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
    """Costs of whole runs: the mean over seeds, and over the scenarios that the strategy has been run on."""
    scenarios = comparison.scenarios if scope == SUITE else [scope]
    by_scenario = [
        np.mean([[trace.costs[column][-1] for column in columns] for trace in traces], axis=0)
        for scenario in scenarios
        if (traces := comparison.own_traces(scenario, name))
    ]
    return np.mean(by_scenario, axis=0).tolist() if by_scenario else None
