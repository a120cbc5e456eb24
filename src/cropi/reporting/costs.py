"""What each arm has cost, from the ledger and the streams of its training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cropi.artifacts import read_jsonl
from cropi.config import Config
from cropi.ledger import SHARED
from cropi.reporting.results import Cost
from cropi.workspace import Arm

Entry = Mapping[str, Any]  # a line of the ledger


def arm_cost(arm: Arm, config: Config, ledger: Sequence[Entry], *, up_to_step: int | None = None) -> Cost:
    """The cost of an arm, of the whole of it or up to an optimiser step.

    Up to a step: all of the collection, scoring and selecting of the stages begun before it, and the steps themselves.
    Each arm pays for the collection in full if it uses the stored trajectories, as if it were run alone, and for
    what was collected for it alone.
    """
    own = [entry for entry in ledger if entry["arm"] == arm.name and _begun(entry, config, up_to_step)]
    steps = [row for row in read_jsonl(arm.folder / "steps.jsonl") if up_to_step is None or row["step"] <= up_to_step]
    batches = [row for row in read_jsonl(arm.rewards) if up_to_step is None or row["step"] < up_to_step]
    shared = [entry for entry in ledger if entry["arm"] == SHARED] if _charged(arm, config) else []
    collected = [entry for entry in (*shared, *own) if entry["phase"] == "collect"]
    return Cost(
        collect=_sum(entry["seconds"] for entry in collected),
        score=_phase(own, "score"),
        select=_phase(own, "select"),
        train=_sum(row["seconds"] for row in steps),
        evaluate=_phase(own, "evaluate"),
        collect_tokens=_whole(_sum(entry["tokens"] for entry in collected if "tokens" in entry)),
        train_tokens=_whole(_sum(row["tokens"] for row in batches)),
    )


def shared_seconds(ledger: Iterable[Entry]) -> dict[str, float]:
    """Seconds of the work that all arms share, by phase."""
    seconds: dict[str, float] = {}
    for entry in ledger:
        if entry["arm"] == SHARED:
            seconds[entry["phase"]] = seconds.get(entry["phase"], 0.0) + entry["seconds"]
    return seconds


def _charged(arm: Arm, config: Config) -> bool:
    return config.arms[arm.name].reads_trajectories


def _begun(entry: Entry, config: Config, up_to_step: int | None) -> bool:
    stage = entry.get("stage")
    return up_to_step is None or stage is None or stage * config.train.steps_per_stage < up_to_step


def _phase(entries: Iterable[Entry], phase: str) -> float | None:
    return _sum(entry["seconds"] for entry in entries if entry["phase"] == phase)


def _sum(values: Iterable[float]) -> float | None:
    """The sum, None of nothing."""
    listed = list(values)
    return sum(listed) if listed else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
