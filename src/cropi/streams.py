"""Streams: JSONL files that are only appended to, with a checksum at the end of every line. One is the cost ledger."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cropi.artifacts import corrupt, full_disk_named, write_text
from cropi.parallel import process_group
from cropi.ray_workers import extra_seconds

_RESTORE = "put back a copy of it, or delete {} and run again."
_CHECK = ', "check": "'  # the end of a line


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line to a stream. A line that an interruption cut short is dropped first.

    Each line ends with a checksum of the stream's name, the line's place and its text. A file beside the stream holds
    its length, written after the line: a stream that is shorter has lost lines.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_named(path), path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        text = json.dumps(row, allow_nan=False)[:-1]
        check = _line_check(path, file.seek(0, os.SEEK_END), text.encode())
        file.write(f'{text}{_CHECK}{check}"}}\n'.encode())
        file.flush()
        os.fsync(file.fileno())
        length = file.tell()
    write_text(_length_file(path), str(length))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read all whole lines of a stream. Leave out a last line that an interruption cut short.

    ArtifactError if the stream was changed.
    """
    return [row for _, row in _stream(path)]


def check_streams(*folders: Path) -> None:
    """Raise ArtifactError if a stream in one of the folders was changed."""
    for file in sorted(file for folder in folders for file in folder.glob(_length_file(Path("*")).name)):
        _stream(file.with_name(file.name.removeprefix(".").removesuffix(".length")))


def cut_jsonl(path: Path, kept: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the end of a stream, from the first line that is not kept."""
    for start, row in _stream(path):
        if not kept(row):
            write_text(_length_file(path), str(start))
            os.truncate(path, start)
            return


def _stream(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Lines of a stream, each with its place."""
    known = _known_length(path)  # before the lines: another process may be writing
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise corrupt(path, f"cannot be read ({error})", _RESTORE.format(path.parent)) from None
    data = data[: data.rfind(b"\n") + 1]
    found, place = [], 0
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        text, _, check = line.rpartition(_CHECK.encode())
        if check != f'{_line_check(path, place, text)}"}}\n'.encode():
            raise corrupt(path, f"line {number} differs from its checksum", _RESTORE.format(path.parent))
        found.append((place, json.loads(text + b"}")))
        place += len(line)
    if place < known:
        raise corrupt(path, f"has lost lines: it holds {place} bytes of {known}", _RESTORE.format(path.parent))
    return found


def _line_check(path: Path, place: int, text: bytes) -> str:
    name = f"{path.absolute().parent.name}/{path.name} {place} "
    return hashlib.sha256(name.encode() + text).hexdigest()[:16]


def _length_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.length")


def _known_length(path: Path) -> int:
    file = _length_file(path)
    try:
        return int(file.read_text(encoding="ascii")) if file.is_file() else 0
    except ValueError as error:
        raise corrupt(file, f"cannot be read ({error})") from None


class Ledger:
    """The cost ledger: seconds and tokens of all work of a run, written as it happens.

    Adds lines {phase, stage, seconds, tokens, ...} to `ledger.jsonl`, of further processes `ledger-RANK.jsonl`. Seconds
    are those of all processes added up: on GPUs, GPU-seconds.

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
