"""The runs of a comparison as arrays: verdicts and costs of every strategy on the same seeds and questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cropi.errors import ArtifactError
from cropi.functional.intervals import Interval

SUITE = "suite"  # all scenarios together
MEASURES = ("steps", "tokens", "flops", "seconds")
PHASES = ("collect", "score", "select", "train")
SECONDS = tuple(f"{phase}_seconds" for phase in PHASES)
FLOPS = ("collect_flops", "score_flops", "train_flops")
TOKENS = ("collect_tokens", "train_tokens")  # generated ones

# Columns that are paid ahead of a stage's steps, and along with them.
PAID: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "tokens": (("collect_tokens",), ("train_tokens",)),
    "flops": (("collect_flops", "score_flops"), ("train_flops",)),
    "seconds": (SECONDS[:-1], SECONDS[-1:]),
}


@dataclass(frozen=True)
class Trace:
    """One strategy with one seed: verdicts (evaluations, questions) by test set, and cumulative costs."""

    steps: np.ndarray
    correct: Mapping[str, np.ndarray]
    questions: Mapping[str, str]  # digest of the questions, by test set
    targeted: Mapping[str, bool]  # by test set
    costs: Mapping[str, np.ndarray]

    def paid(self, measure: str) -> tuple[np.ndarray, np.ndarray]:
        """Costs ahead of the steps and along with them, at every evaluation."""
        nothing = np.zeros(len(self.steps))
        if measure == "steps":
            return nothing, self.steps.astype(float)
        ahead, along = PAID[measure]
        return sum((self.costs[name] for name in ahead), nothing), sum((self.costs[name] for name in along), nothing)


Traces = Mapping[str, Mapping[int, Mapping[str, Trace]]]
"""By scenario, seed and strategy."""


@dataclass(frozen=True)
class Comparison:
    """Statistics and runs, for the report."""

    folder: Path
    summary: Mapping[str, Any]  # as in compare.json
    traces: Traces
    main: str | None  # the strategy of the headline

    @property
    def scenarios(self) -> list[str]:
        """Scenarios with results."""
        known = {entry["scenario"] for entry in self.summary["entries"]}
        return [name for name in self.summary["scenarios"] if name in known]

    @property
    def strategies(self) -> list[str]:
        """Strategies with results."""
        known = {entry["strategy"] for entry in self.summary["entries"]}
        return [name for name in self.summary["strategies"] if name in known]

    @property
    def scope(self) -> str:
        """The suite, or the only scenario."""
        return SUITE if len(self.scenarios) > 1 else self.scenarios[0]

    def entries(self, scenario: str) -> dict[str, Mapping[str, Any]]:
        """Statistics by strategy."""
        return {entry["strategy"]: entry for entry in self.summary["entries"] if entry["scenario"] == scenario}

    def seeds(self, scenario: str, strategy: str) -> list[int]:
        """The seeds on which a strategy is compared: those that the references have finished as well."""
        own, target = self.traces.get(scenario, {}), self.summary["target"]
        needed = {strategy, *self.summary["references"]}
        needed |= {target} if any(target in seed for seed in own.values()) else set()
        return sorted(seed for seed, found in own.items() if needed <= set(found))

    def own_traces(self, scenario: str, strategy: str) -> list[Trace]:
        """Its runs on those seeds."""
        return [self.traces[scenario][seed][strategy] for seed in self.seeds(scenario, strategy)]

    def run(self, scenario: str, seed: int, strategy: str) -> Path | None:
        """The folder of a run; None if it is not here, or if its names name no folder."""
        if any(Path(name).name != name or not name.isprintable() for name in (scenario, strategy)):
            return None
        folder = self.folder / scenario / f"seed-{seed}" / strategy
        return folder if folder.is_dir() else None


def best_strategy(summary: Mapping[str, Any]) -> str | None:
    """The strategy with the largest area over all scenarios that is no reference; if all are, the best of them."""
    several = len({entry["scenario"] for entry in summary["entries"]} - {SUITE}) > 1
    areas = {
        entry["strategy"]: area_of(entry)
        for entry in summary["entries"]
        if entry["area"] and (entry["scenario"] == SUITE) == several
    }
    areas.pop(summary["target"], None)
    others = {name: area for name, area in areas.items() if name not in summary["references"]} or areas
    return max(others, key=lambda name: others[name], default=None)


def area_of(entry: Mapping[str, Any]) -> float:
    """The area by FLOPs, the primary figure; by steps where there is no target strategy to bound the FLOPs."""
    area = entry["area"]
    return float((area.get("flops") or area.get("steps") or {"mean": 0.0})["mean"])


def interval(value: Mapping[str, float | None] | None) -> Interval | None:
    """An interval of the statistics; bounds that are not known are NaN."""
    bounds = ("mean", "low", "high")
    return None if value is None else Interval(*(math.nan if (v := value[name]) is None else v for name in bounds))


def read_traces(table: pa.Table) -> Traces:
    """Traces of a table of results. ArtifactError where strategies of a seed differ in steps or questions."""
    runs: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        runs.setdefault((row["scenario"], row["seed"], row["strategy"]), []).append(row)
    found: dict[str, dict[int, dict[str, Trace]]] = {}
    for (scenario, seed, strategy), rows in runs.items():
        found.setdefault(scenario, {}).setdefault(seed, {})[strategy] = _trace(rows)
    for scenario, seeds in found.items():
        for seed, traces in seeds.items():
            _check_paired(list(traces.values()), f"{scenario}, seed {seed}")
    return found


def _trace(rows: Sequence[Mapping[str, Any]]) -> Trace:
    by_set: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        by_set.setdefault(row["set"], []).append(row)
    first = next(iter(by_set.values()))
    return Trace(
        np.array([row["step"] for row in first]),
        {name: np.array([row["correct"] for row in own], float) for name, own in by_set.items()},
        {name: own[0]["questions"] for name, own in by_set.items()},
        {name: own[0]["targeted"] for name, own in by_set.items()},
        {name: np.array([row[name] for row in first], float) for name in (*SECONDS, *FLOPS, *TOKENS)},
    )


def _check_paired(traces: Sequence[Trace], where: str) -> None:
    first = traces[0]
    for trace in traces:
        same = (trace.questions, trace.targeted) == (first.questions, first.targeted)
        if not (same and np.array_equal(trace.steps, first.steps)):
            raise ArtifactError(
                "strategies were evaluated at other steps or on other questions: they are not paired",
                where=where,
                fix="make these runs anew in a folder of their own.",
            )
