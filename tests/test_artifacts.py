import errno
import json
from pathlib import Path

import pyarrow as pa
import pytest

from cropi import artifacts
from cropi.artifacts import (
    append_jsonl,
    atomic_file,
    build,
    open_artifact,
    read_jsonl,
    read_table,
    write_json,
    write_table,
)
from cropi.errors import ArtifactError

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


def test_an_unfinished_folder_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "junk.parquet").write_text("half")
    assert set(built(tmp_path / "t").files) == {"t.parquet"}


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest", "garbage manifest"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    built(tmp_path / "t")
    path, manifest = tmp_path / "t" / "t.parquet", tmp_path / "t" / "manifest.json"
    data = path.read_bytes()
    match damage:
        case "truncate":
            path.write_bytes(data[:-10])
        case "flip":
            path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        case "remove":
            path.unlink()
        case "manifest":
            manifest.write_text(manifest.read_text()[:40])
        case "garbage manifest":
            manifest.write_text("[]")
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


def test_a_stream_survives_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    append_jsonl(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"a": 2')
    assert read_jsonl(path) == [{"a": 1}]
    append_jsonl(path, {"a": 3})
    assert read_jsonl(path) == [{"a": 1}, {"a": 3}]
    path.write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(ArtifactError, match="line 2"):
        read_jsonl(path)


def test_a_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", [{"a": 1}], SCHEMA)
    with pytest.raises(ArtifactError, match="has the columns"):
        read_table(tmp_path / "t.parquet", pa.schema([("b", pa.int32())]))
