"""Comparisons from Python: start or load one, and read its results as pandas data frames."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from cropi.api import RunResult, html_summary, load
from cropi.cli.shell import quiet_libraries
from cropi.errors import ArtifactError, UserError
from cropi.lab.compare.compare_options import CompareOptions
from cropi.lab.compare.result_table import RESULTS_FILE, read_results


def compare(
    *configs: str,
    strategies: Sequence[str] = ("full", "random", "similarity", "cropi"),
    seeds: Iterable[int] = range(5),
    folder: str | Path = "runs/compare",
    jobs: int | None = None,
    main: str | None = None,
) -> ComparisonResult:
    """Train strategies on the same seeds and questions, as `cropi compare` does. The same call resumes.

    Args:
        configs: Recipes, YAML files, and `key=value` settings that replace theirs.
        strategies: Presets, and YAML files that patch a config.
        seeds: One run of every strategy for each.
        folder: Folder of the runs; a later call adds to it.
        jobs: Runs at once. None: as cores and memory allow.
        main: Strategy of the headline. None: the best.
    """
    quiet_libraries()
    from cropi.lab.compare.run_comparison import compare_runs

    names, listed = ",".join(strategies), ",".join(map(str, seeds))
    options = CompareOptions(list(configs), names, seeds=listed, folder=Path(folder), jobs=jobs, main=main)
    _, failures = compare_runs(options)
    if failures:
        raise UserError(f"{len(failures)} runs failed", where=str(folder), fix="read their .log files; call it again.")
    return load_comparison(folder)


def load_comparison(folder: str | Path) -> ComparisonResult:
    """Open the folder of a comparison. Nothing is written."""
    if not (Path(folder) / "compare.json").is_file():
        raise ArtifactError("is no folder of a comparison", where=str(folder), fix="name one that `compare` wrote.")
    return ComparisonResult(Path(folder))


@dataclass(frozen=True)
class ComparisonResult:
    """A comparison as data frames."""

    folder: Path

    @cached_property
    def summary(self) -> Mapping[str, Any]:
        """The statistics of `compare.json`."""
        return json.loads((self.folder / "compare.json").read_text(encoding="utf-8"))

    @cached_property
    def statistics(self) -> pd.DataFrame:
        """One row per scenario and strategy: `speedup.steps.mean`, `.low`, `.high`, and all other statistics."""
        return pd.json_normalize(self.summary["entries"])

    @cached_property
    def evaluations(self) -> pd.DataFrame:
        """One row per run, evaluation and test set: accuracy, and cumulative seconds, tokens and FLOPs."""
        table = read_results(self.folder / RESULTS_FILE).to_pandas()
        table.insert(6, "accuracy", table.pop("correct").map(lambda correct: float(correct.mean())))
        return table.drop(columns="questions")

    def run(self, strategy: str, *, seed: int, scenario: str | None = None) -> RunResult:
        """One of its runs. Without a scenario: the first."""
        return load(self.folder / (scenario or self.summary["scenarios"][0]) / f"seed-{seed}" / strategy)

    def _repr_html_(self) -> str:
        found = self.statistics.set_index(["scenario", "strategy"]).filter(regex=r"^speedup\..*\.mean$")
        return html_summary(f"Speed-ups to {self.summary['target']}'s accuracy", found, self.folder / "compare.html")
