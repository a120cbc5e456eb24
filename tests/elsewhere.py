"""Workers without a cluster: in this process, but for what has to travel."""

from __future__ import annotations

import pickle
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import pyarrow as pa

from cropi.workers import Make, Order, Unit, Worker, Workers, packed


@dataclass(frozen=True)
class Echo:
    """An order to send units back as they came."""

    def begin(self) -> Make:
        return lambda unit: Unit(unit.index, unit.rows, {})


class Here(Workers):
    """Takes the last unit first, and ends after `stop` of them, as a driver that is killed does."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self.stop, self.made = stop, list[int]()

    def _each(self, order: Order, units: Iterable[Unit]) -> Generator[pa.Table]:
        worker = Worker(pickle.loads(pickle.dumps(order)))
        for unit in reversed(list(units)):
            if len(self.made) == self.stop:
                raise KeyboardInterrupt
            yield worker(packed(unit))
            self.made.append(unit.index)
