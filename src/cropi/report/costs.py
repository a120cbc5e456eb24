"""The cost of a run, from the ledger and the streams of its training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cropi.config import Config
from cropi.ledger import Ledger
from cropi.report.flops import Flops, flops
from cropi.report.results import Cost
from cropi.run_folder import StagePaths
from cropi.streams import read_jsonl

Entry = Mapping[str, Any]  # a line of the ledger


@dataclass(frozen=True)
class Charges:
    """Everything that a run pays for, as it was written down."""

    config: Config
    collected: Sequence[Entry]
    entries: Sequence[Entry]  # all lines of the ledger
    steps: Sequence[Mapping[str, Any]]
    batches: Sequence[Mapping[str, Any]]

    def up_to(self, step: int | None) -> Charges:
        """The charges up to an optimiser step: all of the collection, scoring and selecting of the stages begun before
        it, and the steps themselves.
        """
        if step is None:
            return self
        return Charges(
            self.config,
            [entry for entry in self.collected if self._begun(entry, step)],
            [entry for entry in self.entries if self._begun(entry, step)],
            [row for row in self.steps if row["step"] <= step],
            [row for row in self.batches if row["step"] < step],
        )

    def cost(self) -> Cost:
        """Seconds and generated tokens."""
        return Cost(
            collect=_sum(entry["seconds"] for entry in self.collected),
            score=self._seconds("score"),
            select=self._seconds("select"),
            train=_sum(row["seconds"] for row in self.steps),
            evaluate=self._seconds("evaluate"),
            collect_tokens=_whole(_sum(entry["tokens"] for entry in self.collected if "tokens" in entry)),
            train_tokens=_whole(_sum(row["tokens"] for row in self.batches)),
        )

    def flops(self, parameters: int) -> Flops:
        """Operations, for a policy with so many parameters in matrix products."""
        return flops(self.config, parameters, self.collected, self._phase("score"), self.batches, self.steps)

    def computed_tokens(self) -> int:
        """Tokens that scoring computed, those of the validation prompts and those that were only read included."""
        names = ("computed_tokens", "validation_tokens", "forward_tokens")
        return sum(entry.get(name, 0) for entry in self._phase("score") for name in names)

    def _phase(self, phase: str) -> list[Entry]:
        return [entry for entry in self.entries if entry["phase"] == phase]

    def _seconds(self, phase: str) -> float | None:
        return _sum(entry["seconds"] for entry in self._phase(phase))

    def _begun(self, entry: Entry, step: int) -> bool:
        if "step" in entry:  # work within a stage
            return bool(entry["step"] < step)
        stage = entry.get("stage")
        return stage is None or stage * self.config.train.steps_per_stage < step


def charges(config: Config, paths: StagePaths) -> Charges:
    """The charges of a run. Collection before training counts only if the strategy reads stored trajectories."""
    entries = Ledger(paths.ledger).entries()
    reads = config.select.strategy.collects
    collected = [entry for entry in entries if entry["phase"] == "collect" and (reads or entry["stage"] is not None)]
    return Charges(config, collected, entries, read_jsonl(paths.steps), read_jsonl(paths.rewards))


def _sum(values: Iterable[float]) -> float | None:
    """The sum, None of nothing."""
    listed = list(values)
    return sum(listed) if listed else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
