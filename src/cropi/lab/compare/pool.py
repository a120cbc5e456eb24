"""A pool of spawned processes that can be killed, and that outlives the death of any of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Self

from cropi.lab.compare.worker import Outcome, Task, attempt, last_lines, serve

PATIENCE_S = 10.0  # with a process that has been told to end


@dataclass
class _Worker:
    process: SpawnProcess
    tasks: connection.Connection
    work: tuple[int, Task] | None = None


class Pool:
    """At most `size` processes, each doing one task after another by `work`, a function that they can import.

    Leaving the block ends them at once.
    """

    def __init__(self, size: int, work: Callable[[Task], Outcome] = attempt) -> None:
        self._size, self._work, self._workers = size, work, list[_Worker]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(PATIENCE_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.tasks.close()

    @property
    def has_room(self) -> bool:
        """Whether a task can be given now."""
        return len(self.working) < self._size

    @property
    def working(self) -> list[int]:
        """Keys of the tasks that are being done."""
        return [worker.work[0] for worker in self._workers if worker.work is not None]

    def give(self, key: int, task: Task) -> None:
        """Have a task done."""
        worker = next((w for w in self._workers if w.work is None), None) or self._start()
        worker.work = (key, task)
        try:
            worker.tasks.send(task)
        except OSError:  # it died while it had nothing to do
            self._workers.remove(worker)
            worker.work = None
            self.give(key, task)

    def wait(self, seconds: float) -> list[tuple[int, Outcome]]:
        """Tasks that have ended, as soon as there are any, with their keys; nothing after so many seconds."""
        busy = [worker for worker in self._workers if worker.work is not None]
        connection.wait([*(w.tasks for w in busy), *(w.process.sentinel for w in busy)], seconds)
        ended = []
        for worker in busy:
            outcome = self._outcome(worker)
            if outcome is not None:
                assert worker.work is not None, "only busy workers are asked"
                ended.append((worker.work[0], outcome))
                worker.work = None
        return ended

    def _outcome(self, worker: _Worker) -> Outcome | None:
        """How a worker's task has ended; None while it goes on. A dead worker is let go."""
        died = not worker.process.is_alive()
        try:
            if worker.tasks.poll():
                outcome: Outcome = worker.tasks.recv()
                return outcome
        except (EOFError, OSError):
            died = True
        if not died:
            return None
        worker.process.join()
        self._workers.remove(worker)
        worker.tasks.close()
        assert worker.work is not None, "only busy workers are asked"
        code = worker.process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return Outcome(f"its process {how}\n{last_lines(worker.work[1].log)}".rstrip())

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, self._work), daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker
