"""The cost ledger: seconds and tokens of all work of a run, written as it happens.

Seconds are those of all processes added up: on GPUs, GPU-seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cropi.parallel import process_group
from cropi.ray_workers import extra_seconds
from cropi.streams import append_jsonl, read_jsonl


class Ledger:
    """Adds lines {phase, stage, seconds, tokens, ...} to `ledger.jsonl`, of further processes `ledger-RANK.jsonl`.

    Collection writes `tokens` (of completions), `prompt_tokens` and `passes` over both, scoring `computed_tokens` (of
    the pool, shared prompts once), `estimator`, `validation_tokens`, `forward_tokens` (only read) and `read_passes`
    (low-rank products with a gradient, in forward passes of a token). `report.costs` counts these.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def charge(self, phase: str, *, stage: int | None = None) -> Iterator[dict[str, Any]]:
        """Time a block that all ranks run, also if it ends with an error.

        The block may add `tokens` and other facts to the dictionary. Only the dictionary of rank 0 is written.
        """
        entry: dict[str, Any] = {"phase": phase, "stage": stage}
        start, extra = time.perf_counter(), extra_seconds()
        try:
            yield entry
        finally:
            ranks = process_group()
            if ranks.is_main:
                seconds = (time.perf_counter() - start) * ranks.size + extra_seconds() - extra
                append_jsonl(self._path, entry | {"seconds": seconds} | ranks.facts())

    @contextmanager
    def charge_share(self, phase: str) -> Iterator[dict[str, Any]]:
        """Time a block that belongs to this rank alone. Each rank writes its own file."""
        entry: dict[str, Any] = {"phase": phase, "stage": None}
        start = time.perf_counter()
        try:
            yield entry
        finally:
            append_jsonl(self._own, entry | {"seconds": time.perf_counter() - start})

    def add(self, phase: str, seconds: float, *, stage: int | None = None, **facts: int | float) -> None:
        """Charge work that a Ray worker has timed."""
        append_jsonl(self._own, {"phase": phase, "stage": stage, **facts, "seconds": seconds})

    def entries(self) -> list[dict[str, Any]]:
        """Read all lines so far. Work before the first stage has no stage."""
        others = sorted(self._path.parent.glob(f"{self._path.stem}-*{self._path.suffix}"))
        return [entry for path in (self._path, *others) for entry in read_jsonl(path)]

    @property
    def _own(self) -> Path:
        rank = process_group().rank
        return self._path.with_stem(f"{self._path.stem}-{rank:03}") if rank else self._path
