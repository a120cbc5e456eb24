"""Processes of contenders, and rounds in which they take turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Record:
    """Measurements of one contender."""

    startup_s: float | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    scores_N: np.ndarray | None = None
    error: str | None = None

    def ask(self, worker: Executor, question: Callable[..., Any], *given: Any) -> Any:
        """The worker's answer; None where it fails, with the reason in `error`."""
        try:
            return worker.submit(question, *given).result()
        except Exception as error:  # the model may raise anything, and a process may end
            self.error = " ".join(f"{type(error).__name__}: {error}".split())
            return None


def take_rounds(
    workers: Mapping[str, Executor],
    records: Mapping[str, Record],
    rounds: int,
    run: Callable[[], dict[str, Any]],
    advance: Callable[[], None],
) -> None:
    """Run every worker once a round, one at a time. Each round starts with another worker, so that none always follows
    the same neighbour. A worker that fails drops out."""
    names = list(workers)
    for number in range(rounds):
        shift = number % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            record = records[name]
            if record.error is None and (answer := record.ask(workers[name], run)) is not None:
                record.rounds.append(answer)
            advance()
