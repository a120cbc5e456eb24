import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cropi import artifacts
from cropi.artifacts import (
    atomic_file,
    build,
    open_artifact,
    read_sealed,
    read_table,
    remove_parts,
    write_json,
    write_sealed,
    write_table,
)
from cropi.errors import ArtifactError
from cropi.streams import append_jsonl, cut_jsonl, read_jsonl

SCHEMA = pa.schema([("a", pa.int32())])


def make(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    write_table(folder / "t.parquet", [{"a": 1}, {"a": 2}], SCHEMA)
    return {"ok": 2}, {}


def built(folder: Path, **inputs: str) -> artifacts.Manifest:
    return build(folder, "thing", make, inputs=inputs or {"x": "1"}, made_by="cropi run")


def test_built_once_then_opened(tmp_path: Path) -> None:
    first = built(tmp_path / "t")
    stamp = (tmp_path / "t" / "t.parquet").stat().st_mtime_ns
    assert built(tmp_path / "t") == first
    assert (tmp_path / "t" / "t.parquet").stat().st_mtime_ns == stamp


DAMAGES = {
    "truncate": ("t.parquet", lambda data: data[:-10]),
    "flip": ("t.parquet", lambda data: bytes([data[0] ^ 1]) + data[1:]),
    "remove": ("t.parquet", lambda data: None),
    "manifest": ("manifest.json", lambda data: data[:40]),
    "garbage manifest": ("manifest.json", lambda data: b"[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    built(tmp_path / "t")
    name, change = DAMAGES[damage]
    path = tmp_path / "t" / name
    changed = change(path.read_bytes())
    path.unlink() if changed is None else path.write_bytes(changed)
    with pytest.raises(ArtifactError, match=r"Fix: delete .* go on with `cropi run`"):
        open_artifact(tmp_path / "t", "thing", made_by="cropi run")


def test_other_inputs_and_other_kinds_are_refused(tmp_path: Path) -> None:
    built(tmp_path / "t")
    with pytest.raises(ArtifactError, match="made from another x"):
        built(tmp_path / "t", x="2")
    with pytest.raises(ArtifactError, match="describes 'thing'"):
        open_artifact(tmp_path / "t", "other", made_by="cropi run")
    with pytest.raises(ArtifactError, match="run `cropi collect` first"):
        open_artifact(tmp_path / "none", "other", made_by="cropi collect")


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    write_json(path, {"a": 1})

    def fail() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ArtifactError, match="no space left on the disk"):
        fail()
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_nan_never_gets_into_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "f.json", {"a": float("nan")})


def stream(folder: Path, count: int = 4) -> Path:
    path = folder / "s.jsonl"
    for number in range(count):
        append_jsonl(path, {"a": number, "b": [0.1, None, "ü"]})
    return path


def test_a_stream_survives_a_cut_line(tmp_path: Path) -> None:
    path = stream(tmp_path, 1)
    with path.open("ab") as file:
        file.write(b'{"a": 2')
    assert [row["a"] for row in read_jsonl(path)] == [0]
    append_jsonl(path, {"a": 3})
    assert [row["a"] for row in read_jsonl(path)] == [0, 3]


def test_no_byte_of_a_stream_can_change_unnoticed(tmp_path: Path) -> None:
    path = stream(tmp_path, 2)
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ArtifactError, match=r"s\.jsonl"):
            read_jsonl(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match="has lost lines"):
            read_jsonl(path)


STREAM_DAMAGES = {
    "swapped lines": lambda lines: [*lines[1:], lines[0]],
    "lost line": lambda lines: [lines[0], *lines[2:]],
    "twice": lambda lines: [lines[0], *lines],
    "deleted": lambda lines: None,
}


@pytest.mark.parametrize("damage", [*STREAM_DAMAGES, "another's", "length"])
def test_a_stream_that_is_not_what_was_appended_is_refused(tmp_path: Path, damage: str) -> None:
    path = stream(tmp_path)
    if damage == "length":
        (tmp_path / ".s.jsonl.length").write_text("1x")
    elif damage == "another's":
        path.write_bytes(stream(tmp_path / "other").read_bytes())
    else:
        changed = STREAM_DAMAGES[damage](path.read_bytes().splitlines(keepends=True))
        path.unlink() if changed is None else path.write_bytes(b"".join(changed))
    with pytest.raises(ArtifactError, match=r"s\.jsonl"):
        read_jsonl(path)


def test_a_stream_is_cut_at_the_first_line_that_is_not_kept(tmp_path: Path) -> None:
    path = stream(tmp_path)
    before = path.read_bytes()
    cut_jsonl(path, lambda row: row["a"] < 9)
    assert path.read_bytes() == before
    cut_jsonl(path, lambda row: row["a"] < 2)
    assert [row["a"] for row in read_jsonl(path)] == [0, 1]
    append_jsonl(path, {"a": 2, "b": [0.1, None, "ü"]})
    append_jsonl(path, {"a": 3, "b": [0.1, None, "ü"]})
    assert path.read_bytes() == before


def test_a_process_may_end_between_a_line_and_its_length(tmp_path: Path) -> None:
    path = stream(tmp_path, 1)
    length = (tmp_path / ".s.jsonl.length").read_text()
    append_jsonl(path, {"a": 1})
    (tmp_path / ".s.jsonl.length").write_text(length)
    assert [row["a"] for row in read_jsonl(path)] == [0, 1]


def refused_or_the_same(path: Path, value: dict[str, Any]) -> bool:
    try:
        return read_sealed(path) == value  # white space may change
    except ArtifactError:
        return True


def test_no_byte_of_sealed_json_can_change_its_meaning_unnoticed(tmp_path: Path) -> None:
    path, value = tmp_path / "f.json", {"a": [1, 0.5, "x"], "b": {"c": None}}
    write_sealed(path, value)
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert refused_or_the_same(path, value)
    path.write_text("[]")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_sealed(path)


def test_what_killed_processes_were_writing_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    left = tmp_path / "in" / f".t.parquet.{int(dead.stdout)}.part"
    others = [tmp_path / f".t.parquet.{os.getpid()}.part", tmp_path / "features.bin.part", tmp_path / "in" / "mine"]
    for path in (left, *others):
        path.write_text("half")
    remove_parts(tmp_path)
    assert not left.exists()
    assert all(path.exists() for path in others)


def test_a_link_in_place_of_a_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "mine").write_text("dear")
    (tmp_path / "t").symlink_to("theirs")
    with pytest.raises(ArtifactError, match="symbolic link"):
        built(tmp_path / "t")
    assert (tmp_path / "theirs" / "mine").read_text() == "dear"


def test_a_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", [{"a": 1}], SCHEMA)
    with pytest.raises(ArtifactError, match="has the columns"):
        read_table(tmp_path / "t.parquet", pa.schema([("b", pa.int32())]))
