"""The cost ledger: seconds and tokens of everything a run does, written as it happens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cropi.artifacts import append_jsonl, read_jsonl

SHARED = ""  # the arm of work that all arms use


class Ledger:
    """Adds lines {arm, phase, stage, seconds, tokens, ...} to `ledger.jsonl`.

    Collection writes `tokens` (of completions), `prompt_tokens` and `passes` over both, scoring `computed_tokens` (of
    the pool, shared prompts once), `validation_tokens` and `forward_tokens` (only read): what `reporting.flops` counts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def charge(self, phase: str, *, arm: str = SHARED, stage: int | None = None) -> Iterator[dict[str, Any]]:
        """Time a block; the block may put `tokens` and the like into the dictionary it is given.

        A block that ends with an error is charged as well: its seconds were spent.
        """
        entry: dict[str, Any] = {"arm": arm, "phase": phase, "stage": stage}
        start = time.perf_counter()
        try:
            yield entry
        finally:
            append_jsonl(self._path, entry | {"seconds": time.perf_counter() - start})

    def entries(self) -> list[dict[str, Any]]:
        """All lines so far."""
        return read_jsonl(self._path)
