"""Streams: JSONL files that are only appended to, with a checksum at the end of every line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cropi.artifacts import corrupt, no_space, write_text

_RESTORE = "put back a copy of it, or delete {} and run again."
_CHECK = ', "check": "'  # the end of a line


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line to a stream. A line that an interruption cut short is dropped first.

    Each line ends with a checksum of the stream's name, the line's place and its text. A file beside the stream holds
    its length, written after the line: a stream that is shorter has lost lines.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("ab+") as file:
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
    except OSError as error:
        raise no_space(path) if error.errno in {errno.ENOSPC, errno.EDQUOT} else error from None
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
