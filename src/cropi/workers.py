"""Work for processes elsewhere that share neither memory nor files with this one: units with rows of their own.

This process hands out the units and keeps what comes back; nobody else writes to the run's folder. Free of torch, and
of what starts the workers.
"""

from __future__ import annotations

import json
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from cropi.errors import UserError

UNITS = pa.schema(
    [
        ("unit", pa.int64()),
        ("facts", pa.string()),  # JSON
        ("rows", pa.large_binary()),  # a table as an Arrow stream: a unit is never divided
    ]
)


@dataclass(frozen=True)
class Unit:
    """A piece of work: on the way to a worker what it is made from, on the way back what has been made."""

    index: int
    rows: pa.Table
    facts: Mapping[str, Any]  # JSON values


Make = Callable[[Unit], Unit]


class Order(Protocol):
    """What workers are to do with units. It travels to them."""

    def begin(self) -> Make:
        """Make ready, once in every worker. UserError where that cannot be."""


def packed(unit: Unit) -> pa.Table:
    """A unit as a table of one row, by the columns of `UNITS`."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, unit.rows.schema) as stream:
        stream.write_table(unit.rows)
    row = {"unit": unit.index, "facts": json.dumps(dict(unit.facts)), "rows": sink.getvalue().to_pybytes()}
    return pa.Table.from_pylist([row], schema=UNITS)


def unpacked(table: pa.Table) -> Unit:
    """The unit of such a table."""
    (row,) = table.to_pylist()
    with pa.ipc.open_stream(row["rows"]) as stream:
        return Unit(row["unit"], stream.read_all(), json.loads(row["facts"]))


class Worker:
    """One process's side: made ready by the first unit, then a unit at a time.

    What a user can fix goes back as a unit with the fact `error`; anything else ends the work with its traceback.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._make: Make | None = None

    def __call__(self, table: pa.Table) -> pa.Table:
        unit = unpacked(table)
        try:
            self._make = self._make or self._order.begin()
            start = time.perf_counter()
            made = self._make(unit)
        except UserError as error:
            return packed(failed(unit, error))
        return packed(Unit(made.index, made.rows, {**made.facts, "seconds": time.perf_counter() - start}))


def failed(unit: Unit, error: UserError) -> Unit:
    """What comes back of a unit that a user has to do something about."""
    return Unit(unit.index, pa.table({}), {"error": [f"{error.what} (on {platform.node()})", error.where, error.fix]})


class Workers(ABC):
    """Processes elsewhere. `seconds` is how long they have worked on units, `waited` how long this one for them."""

    def __init__(self) -> None:
        self.seconds = self.waited = 0.0

    @property
    def owed_s(self) -> float:
        """What has to be added to this process's own seconds to have those of all work that was done."""
        return self.seconds - self.waited

    def each(self, order: Order, units: Iterable[Unit]) -> Generator[Unit]:
        """What is made of each unit, in the order in which they are done, each with the fact `seconds`.

        UserError as a worker has met it. Every unit comes back once: anything else is a mistake of `_each`. To be
        closed where it is not gone through to its end.
        """
        asked, back = set[int](), set[int]()
        with closing(self._each(order, _noting(units, asked))) as tables:
            while (table := self._next(tables)) is not None:
                unit = unpacked(table)
                if "error" in unit.facts:
                    what, where, fix = unit.facts["error"]
                    raise UserError(what, where=where, fix=fix)
                if unit.index in back or unit.index not in asked:
                    raise ValueError(f"unit {unit.index} came back twice, or was not asked for")
                back.add(unit.index)
                self.seconds += unit.facts["seconds"]
                yield unit
        if back != asked:
            raise ValueError(f"units {sorted(asked - back)} did not come back")

    def _next(self, tables: Iterator[pa.Table]) -> pa.Table | None:
        start = time.perf_counter()
        try:
            return next(tables, None)
        finally:
            self.waited += time.perf_counter() - start

    @abstractmethod
    def _each(self, order: Order, units: Iterable[Unit]) -> Generator[pa.Table]:
        """What `Worker(order)` makes of each unit, packed, in any order."""


def _noting(units: Iterable[Unit], asked: set[int]) -> Iterator[Unit]:
    for unit in units:
        asked.add(unit.index)
        yield unit
