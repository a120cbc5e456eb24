"""Selections of the strategies of a comparison by source, read from run folders."""

from __future__ import annotations

from collections import Counter
from itertools import count, takewhile
from pathlib import Path

from cropi.lab.compare.paired_runs import Comparison
from cropi.report.choosing import Columns, selected_sources
from cropi.report.reading import Selection, read_selection
from cropi.run_folder import StagePaths


def selected_by_strategy(comparison: Comparison, scenario: str) -> dict[str, Columns]:
    """By strategy: prompts by source, of the pool and of every stage, summed over seeds; none without run folders."""
    found: dict[str, Columns] = {}
    for strategy in comparison.strategies:
        for seed in comparison.seeds(scenario, strategy):
            folder = comparison.run(scenario, seed, strategy)
            if folder and (selections := _selections(folder)):
                own = found.setdefault(strategy, {})
                for title, counts in selected_sources(selections).items():
                    own.setdefault(title, Counter()).update(counts)
    return found


def _selections(folder: Path) -> dict[int, Selection]:
    made = (read_selection(StagePaths(folder), stage) for stage in count())
    return dict(enumerate(one for one in takewhile(lambda one: one is not None, made) if one is not None))


def compared_sources(by_strategy: dict[str, Columns]) -> Columns:
    """Sources of the pool, and of all stages of every strategy that left prompts out; empty if none did."""
    taken = {
        strategy: sum((own for title, own in columns.items() if title != "pool"), Counter())
        for strategy, columns in by_strategy.items()
        if any(own != columns["pool"] for own in columns.values())
    }
    return {"pool": next(iter(by_strategy.values()))["pool"]} | taken if taken else {}
