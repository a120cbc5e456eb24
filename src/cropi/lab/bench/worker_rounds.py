"""Worker processes of contenders, and rounds in which they take turns."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np


class WorkerError(Exception):
    """A question that a worker failed to answer, in one line."""


class Worker:
    """A process that answers questions in JSON (`worker_protocol.py`); its other output goes to a log."""

    def __init__(self, command: Sequence[str], log: Path, *, threads: int) -> None:
        self._log = log
        # Before the process starts: libraries read it when they are loaded.
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w") as stderr:
            self._process = subprocess.Popen(  # noqa: S603 - this project's own module
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Ask it to quit, then make sure that it has."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError, subprocess.TimeoutExpired):  # it is gone already, or will be in a moment
            if kind is None:
                self._process.stdin.write('{"op": "quit"}\n')
                self._process.stdin.flush()
                self._process.wait(30)
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with suppress(OSError):
            self._process.stdin.close()

    def ask(self, op: str, **question: Any) -> dict[str, Any]:
        """The answer to a question; WorkerError where there is none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **question}) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError):  # ValueError: closed on our side
            raise WorkerError(self._last_words()) from None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if not answer.get("ok", True):
            raise WorkerError(answer["error"])
        return answer

    def warnings(self) -> list[str]:
        """Warnings of cropi in its log so far, such as smaller batches for lack of memory."""
        lines = self._log.read_text(errors="replace").splitlines()
        return list(dict.fromkeys(line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")))

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"its process ended with code {code}: {lines[-1] if lines else 'its log is empty'}"


@dataclass
class Record:
    """Measurements of one contender."""

    startup_s: float | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """A worker's answers to `run`, in order."""
    scores_N: np.ndarray | None = None
    error: str | None = None
    warnings: list[str] = field(default_factory=list)


def take_rounds(
    workers: Mapping[str, Worker], records: Mapping[str, Record], rounds: int, advance: Callable[[], None]
) -> None:
    """Run every worker once a round, one at a time. Each round starts with another worker, so that none always follows
    the same neighbour. A worker that fails drops out."""
    names = list(workers)
    for number in range(rounds):
        shift = number % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            record = records[name]
            if record.error is None:
                try:
                    record.rounds.append(workers[name].ask("run"))
                except WorkerError as error:
                    record.error = str(error)
            advance()
