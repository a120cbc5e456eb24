"""Ranks played by threads, for code that looks up the process group."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import Tensor

from cropi import parallel
from cropi.parallel import ProcessGroup, T, process_group


class Threads(ProcessGroup):
    """One object for all ranks; each thread has its own rank. A rank that fails breaks the wait of the others."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: list[Any] = [None] * size
        self._local = threading.local()
        self.meeting = threading.Barrier(size, timeout=30)

    @property
    def rank(self) -> int:  # type: ignore[override]
        return self._local.rank

    def run(self, rank: int, work: Callable[[], Any], found: list[Any]) -> None:
        self._local.rank = rank
        try:
            found[rank] = work()
        except Exception as error:
            self.meeting.abort()
            found[rank] = error

    def barrier(self) -> None:
        self.meeting.wait()

    def gather(self, value: T) -> list[T]:
        self._values[self.rank] = value
        self.barrier()
        found = list(self._values)
        self.barrier()
        return found

    def from_main(self, find: Callable[[], T]) -> T:
        return self.gather(find() if self.is_main else None)[0]  # type: ignore[return-value]

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        raise NotImplementedError

    copy_main = add


def together(work: Callable[[ProcessGroup], Any], size: int = 2) -> list[Any]:
    """The result of each rank: a value or an exception."""
    threads, found = Threads(size), [None] * size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "_group", threads)
        started = [
            threading.Thread(target=threads.run, args=(rank, lambda: work(process_group()), found), daemon=True)
            for rank in range(size)
        ]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join(timeout=60)
            assert not thread.is_alive(), "a rank waits for ever"
    return found
