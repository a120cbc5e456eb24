"""The cost ledger: seconds and tokens of all work of a run, written as it happens.

Seconds are those of all processes added up: on GPUs, GPU-seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cropi.artifacts import append_jsonl, read_jsonl
from cropi.world import ALONE, World


class Ledger:
    """Adds lines {phase, stage, seconds, tokens, ...} to `ledger.jsonl`, of further processes `ledger-RANK.jsonl`.

    Collection writes `tokens` (of completions), `prompt_tokens` and `passes` over both, scoring `computed_tokens` (of
    the pool, shared prompts once), `validation_tokens` and `forward_tokens` (only read): what `reporting.flops` counts.
    """

    def __init__(self, path: Path, world: World = ALONE) -> None:
        self._path, self._world = path, world

    @contextmanager
    def charge(
        self, phase: str, *, stage: int | None = None, owed: Callable[[], float] = lambda: 0.0
    ) -> Iterator[dict[str, Any]]:
        """Time a block that all processes go through together, or wait at; the block may put `tokens` and the like into
        the dictionary it is given, of which that of the first process counts.

        A block that ends with an error is charged as well: its seconds were spent. `owed`: see `Workers.owed_s`.
        """
        entry: dict[str, Any] = {"phase": phase, "stage": stage}
        start, before = time.perf_counter(), owed()
        try:
            yield entry
        finally:
            if self._world.is_main:
                seconds = (time.perf_counter() - start) * self._world.size + owed() - before
                append_jsonl(self._path, entry | {"seconds": seconds} | self._world.facts())

    @contextmanager
    def charge_share(self, phase: str, *, stage: int | None = None) -> Iterator[dict[str, Any]]:
        """The same of work that is this process's alone: every process writes a file of its own."""
        entry: dict[str, Any] = {"phase": phase, "stage": stage}
        start = time.perf_counter()
        try:
            yield entry
        finally:
            append_jsonl(self._own, entry | {"seconds": time.perf_counter() - start})

    def add(self, phase: str, seconds: float, *, stage: int | None = None, **facts: int | float) -> None:
        """Charge work that another process has timed."""
        append_jsonl(self._own, {"phase": phase, "stage": stage, **facts, "seconds": seconds})

    def entries(self) -> list[dict[str, Any]]:
        """All lines so far. Work before the first stage has no stage: runs of a comparison share it."""
        others = sorted(self._path.parent.glob(f"{self._path.stem}-*{self._path.suffix}"))
        return [entry for path in (self._path, *others) for entry in read_jsonl(path)]

    @property
    def _own(self) -> Path:
        rank = self._world.rank
        return self._path.with_stem(f"{self._path.stem}-{rank:03}") if rank else self._path
