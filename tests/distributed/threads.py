"""Processes of a run played by threads, for what they ask of each other through the store."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch.distributed import HashStore

from cropi.distributed import Launched
from cropi.world import OtherFailed, T, World


class Thread(Launched):
    """One of several; values are gathered in memory."""

    def __init__(self, store: Any, rank: int, size: int, values: dict[int, Any]) -> None:
        super().__init__(store, rank, size)
        self._values = values

    def gather(self, value: T) -> list[T]:
        self._values[self.rank] = value
        self.barrier()
        found = [self._values[rank] for rank in range(self.size)]
        self.barrier()
        return found


def together(work: Callable[[World], Any], size: int = 2, store: Any = None) -> list[Any]:
    """What each of them comes to: a value or an exception. `store` is one that others may have used before."""
    values, found = dict[int, Any](), list[Any]([None] * size)
    store = HashStore() if store is None else store

    def one(rank: int) -> None:
        world = Thread(store, rank, size, values)
        try:
            found[rank] = work(world)
        except Exception as error:
            if not isinstance(error, OtherFailed):
                world.fail(2)
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive(), "a process waits for ever"
    return found
