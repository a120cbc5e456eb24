"""What the report of a comparison reads: `results.parquet`, `compare.json`, and the folders of runs where they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cropi.errors import ArtifactError
from cropi.functional.bootstrap import Interval

SUITE = "suite"  # all scenarios together, as compare.json names them
MEASURES = ("steps", "tokens", "flops", "seconds")
PHASES = ("collect", "score", "select", "train")
SECONDS = tuple(f"{phase}_seconds" for phase in PHASES)
FLOPS = ("collect_flops", "score_flops", "train_flops")
TOKENS = ("collect_tokens", "train_tokens")  # generated ones
COSTS = (*SECONDS, *FLOPS, *TOKENS)
KEYS = ("scenario", "strategy", "seed", "step", "set")


@dataclass(frozen=True)
class Trace:
    """One strategy with one seed: verdicts (evaluations, questions) by test set, and cumulative costs."""

    steps: np.ndarray
    correct: Mapping[str, np.ndarray]
    questions: Mapping[str, str]  # digest by test set: the same questions have the same one
    costs: Mapping[str, np.ndarray]

    def paid(self, measure: str) -> tuple[np.ndarray, np.ndarray]:
        """Costs ahead of the steps and along with them, at every evaluation."""
        ahead, along = {
            "steps": ((), ()),
            "tokens": (("collect_tokens",), ("train_tokens",)),
            "flops": (("collect_flops", "score_flops"), ("train_flops",)),
            "seconds": (SECONDS[:-1], SECONDS[-1:]),
        }[measure]
        if measure == "steps":
            return np.zeros(len(self.steps)), self.steps.astype(float)
        nothing = np.zeros(len(self.steps))
        return sum((self.costs[name] for name in ahead), nothing), sum((self.costs[name] for name in along), nothing)


@dataclass(frozen=True)
class Comparison:
    """All that the sections are made from."""

    folder: Path
    summary: Mapping[str, Any]  # compare.json
    traces: Mapping[str, Mapping[int, Mapping[str, Trace]]]  # by scenario, seed and strategy
    targeted: Mapping[str, Mapping[str, bool]]  # by scenario and test set
    main: str | None  # the strategy that the headline is about
    chosen_before: bool  # whether it was named beforehand, or is the best on these data

    @property
    def scenarios(self) -> list[str]:
        """Scenarios of which there is anything to show."""
        known = {entry["scenario"] for entry in self.summary["entries"]}
        return [name for name in self.summary["scenarios"] if name in known]

    @property
    def strategies(self) -> list[str]:
        """Strategies of which there is anything to show."""
        known = {entry["strategy"] for entry in self.summary["entries"]}
        return [name for name in self.summary["strategies"] if name in known]

    @property
    def scope(self) -> str:
        """Where the main result stands: the suite, or the only scenario."""
        return SUITE if len(self.scenarios) > 1 else self.scenarios[0]

    def entries(self, scenario: str) -> dict[str, Mapping[str, Any]]:
        """Statistics by strategy."""
        return {entry["strategy"]: entry for entry in self.summary["entries"] if entry["scenario"] == scenario}

    def seeds(self, scenario: str, strategy: str) -> list[int]:
        """The seeds on which a strategy is compared: those that the references have finished as well."""
        own = self.traces.get(scenario, {})
        target = self.summary["target"]
        needed = {strategy, *self.summary["references"]}
        needed |= {target} if any(target in seed for seed in own.values()) else set()
        return sorted(seed for seed, found in own.items() if needed <= set(found))

    def own_traces(self, scenario: str, strategy: str) -> list[Trace]:
        """Its runs on those seeds."""
        return [self.traces[scenario][seed][strategy] for seed in self.seeds(scenario, strategy)]

    def run(self, scenario: str, seed: int, strategy: str) -> Path | None:
        """The folder of a run; None where it is not here (or its names name no folder)."""
        if any(Path(name).name != name or not name.isprintable() for name in (scenario, strategy)):
            return None
        folder = self.folder / scenario / f"seed-{seed}" / strategy
        return folder if folder.is_dir() else None


def read_comparison(folder: Path, main: str | None) -> Comparison:
    """Read statistics and table. ArtifactError where one is missing or damaged, or has no strategy `main`."""
    path = folder / "compare.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        wanted = ("target", "references", "best_reference", "redraws", "confidence", "scenarios", "aside", "up_to_step")
        summary = {key: summary[key] for key in (*wanted, "strategies", "entries")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise damaged(path, error) from None
    if main is not None and main not in summary["strategies"]:
        raise ArtifactError(f"has no strategy {main!r}", where=str(path), fix=f"one of {summary['strategies']}.")
    traces, targeted = _traces(_table(folder / "results.parquet"))
    return Comparison(folder, summary, traces, targeted, main or _leader(summary), main is not None)


def interval(value: Mapping[str, float] | None) -> Interval | None:
    """An interval of compare.json."""
    return None if value is None else Interval(value["mean"], value["low"], value["high"])


def damaged(path: Path, error: Exception) -> ArtifactError:
    """The error for a file that cannot be used."""
    return ArtifactError(
        f"cannot be read ({type(error).__name__}: {error})",
        where=str(path),
        fix="run the same `cropi compare` again: it is made anew from the runs.",
    )


def _leader(summary: Mapping[str, Any]) -> str | None:
    """The strategy with the largest area over all scenarios that is no reference; where all are, the best of those."""
    several = len({entry["scenario"] for entry in summary["entries"]} - {SUITE}) > 1
    areas = {
        entry["strategy"]: entry["area"]["steps"]["mean"]
        for entry in summary["entries"]
        if "steps" in entry["area"] and (entry["scenario"] == SUITE) == several
    }
    areas.pop(summary["target"], None)
    others = {name: area for name, area in areas.items() if name not in summary["references"]} or areas
    return max(others, key=lambda name: others[name], default=None)


def _table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, columns=[*KEYS, "targeted", "questions", "correct", *COSTS])
    except (OSError, pa.ArrowInvalid, LookupError) as error:
        raise damaged(path, error) from None


def _traces(
    table: pa.Table,
) -> tuple[dict[str, dict[int, dict[str, Trace]]], dict[str, dict[str, bool]]]:
    runs: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    targeted: dict[str, dict[str, bool]] = {}
    for row in table.to_pylist():
        runs.setdefault((row["scenario"], row["seed"], row["strategy"]), []).append(row)
        targeted.setdefault(row["scenario"], {})[row["set"]] = row["targeted"]
    found: dict[str, dict[int, dict[str, Trace]]] = {}
    for (scenario, seed, strategy), rows in runs.items():
        found.setdefault(scenario, {}).setdefault(seed, {})[strategy] = _trace(rows)
    return found, targeted


def _trace(rows: Sequence[Mapping[str, Any]]) -> Trace:
    by_set: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        by_set.setdefault(row["set"], []).append(row)
    first = next(iter(by_set.values()))
    return Trace(
        np.array([row["step"] for row in first]),
        {name: np.array([row["correct"] for row in own], float) for name, own in by_set.items()},
        {name: own[0]["questions"] for name, own in by_set.items()},
        {name: np.array([row[name] for row in first], float) for name in COSTS},
    )
