"""Read rows of data files and Hub datasets as dicts; `prompt_table` interprets them."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cropi.config import FileSource, HubSource
from cropi.errors import DataError, first_line


class Row(NamedTuple):
    """A raw row and its place, for errors."""

    values: dict[str, Any]
    where: str


def raw_rows(source: FileSource | HubSource, key: str) -> list[Row]:
    """Read all rows of a source; `key` is its place in the config. DataError names the line that cannot be read."""
    if isinstance(source, HubSource):
        return list(_hub(source, key))
    path = Path(source.path).expanduser()
    if not path.is_file():
        what = f"{path} is a folder" if path.is_dir() else f"there is no file {path}"
        raise DataError(what, where=f"{key}.path", fix="name a file.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} is none of {', '.join(_READERS)}", where=f"{key}.path", fix="convert or rename the file."
        )
    try:
        return list(reader(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error})", where=key, fix="save it as UTF-8.") from None
    except (OSError, csv.Error, pa.ArrowException) as error:
        kind = path.suffix.lower().removeprefix(".")
        raise DataError(f"{path} cannot be read as {kind} ({error})", where=key, fix="write the file again.") from None


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _row(_parsed(line, path, f"line {number}"), path, f"line {number}")


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, or one object a line, which many tools also write under this name."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not content.lstrip().startswith(b"["):
        yield from _jsonl(path)
        return
    for number, value in enumerate(_parsed(content, path, "the file"), start=1):
        yield _row(value, path, f"row {number}")


def _csv(path: Path) -> Iterator[Row]:
    """Every value is text, exactly as in the file."""
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        _unrepeated(reader.fieldnames or (), path)
        for values in reader:
            where = f"line {reader.line_num}"
            if None in values or None in values.values():
                raise DataError(f"{where} has more or fewer values than the header", where=str(path), fix="correct it.")
            yield _row(values, path, where)


def _parquet(path: Path) -> Iterator[Row]:
    table = pq.read_table(path)
    _unrepeated(table.column_names, path)
    for number, values in enumerate(table.to_pylist(), start=1):
        yield _row(values, path, f"row {number}")


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _parsed(text: bytes, path: Path, what: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unrepeated_keys)
    except UnicodeDecodeError as error:
        raise DataError(f"{what} is not UTF-8 ({error})", where=str(path), fix="save it as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is not JSON ({error})", where=str(path), fix=f"correct {what}.") from None


def _unrepeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} occurs twice in an object")
    return found


def _unrepeated(names: Sequence[str], path: Path) -> None:
    if len(set(names)) < len(names):
        raise DataError("two columns have one name", where=str(path), fix="rename or remove one.")


def _row(values: Any, path: Path, where: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(f"{where} is not a JSON object", where=str(path), fix=f"correct {where}.")
    return Row(values, f"{path}, {where}")


def _hub(source: HubSource, key: str) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(source.dataset, source.name, split=source.split, revision=source.revision)
    except Exception as error:  # datasets raises many kinds
        raise DataError(
            f"the dataset {source.dataset!r} cannot be loaded: {first_line(error)}",
            where=f"{key}.dataset",
            fix="check its id, name, split and revision; offline, download it and use type: file.",
        ) from None
    for number, values in enumerate(rows, start=1):
        yield Row(dict(values), f"{source.dataset}, row {number}")
