"""The feature store: its bytes, its checks, and what an interruption leaves of it."""

import dataclasses
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cropi import artifacts
from cropi.errors import ArtifactError
from cropi.gradients import store as module
from cropi.gradients.store import (
    FeatureStore,
    FeatureStoreWriter,
    StoreIdentity,
    directions_digest,
    keep_directions,
    open_store,
    stored_directions,
)

N, D, SHARD = 11, 6, 4  # three shards, the last one short
IDS = [f"p{i:02d}" for i in range(N)]
DIRECTIONS = {"b.weight": torch.eye(4)[:, :2], "a.weight": torch.arange(3.0)[:, None], "none": torch.zeros(5, 0)}
IDENTITY = StoreIdentity(
    projection="count-sketch-v2-d6",
    directions=directions_digest(DIRECTIONS),
    policy="policy-1",
    tokenizer="tokenizer-1",
    normalizer="sequence",
    max_completion_length=64,
    temperature=0.8,
    advantage_std=True,
    correction="token",
    clip=0.2,
    prefix_cap=10.0,
    baseline="group",
    trajectories="trajectories-1",
    dtype="bfloat16",
    dim=D,
)
FLOAT32 = dataclasses.replace(IDENTITY, dtype="float32")


def features() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    features_ND = torch.randn(N, D, generator=generator) * torch.logspace(-6, 6, N)[:, None]
    features_ND[3] = 0.0
    return features_ND


def row(index: int) -> dict[str, Any]:
    status = "no_signal" if index == 3 else "ok"
    norm = float(features()[index].double().norm())
    return {
        "prompt_id": IDS[index],
        "status": status,
        "norm": norm,
        "ratio_ess": 0.5,
        "clip_share": 0.25,
        "kl": 0.1,
        "tokens": index,
    }


def begin(folder: Path, identity: StoreIdentity = IDENTITY, **changes: Any) -> FeatureStoreWriter:
    prompt_ids = changes.pop("prompt_ids", IDS)
    return FeatureStoreWriter(folder, identity, prompt_ids, **{"shard_rows": SHARD, "directions": DIRECTIONS} | changes)


def write(writer: FeatureStoreWriter, *shards: int) -> None:
    for shard in shards:
        part = writer.shard(shard)
        writer.write_shard(shard, features()[part], [row(i) for i in range(N)[part]])


def complete(folder: Path, identity: StoreIdentity = IDENTITY) -> FeatureStore:
    writer = begin(folder, identity)
    write(writer, *writer.missing())
    return writer.finish()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("identity", [IDENTITY, FLOAT32], ids=["bfloat16", "float32"])
def test_what_is_written_is_read_again(tmp_path: Path, identity: StoreIdentity) -> None:
    written, read = complete(tmp_path / "s", identity), open_store(tmp_path / "s", identity)
    assert written == read
    assert (read.prompt_ids, read.identity) == (IDS, identity)
    assert read.rows().to_pylist() == [row(i) for i in range(N)]
    assert read.manifest.counts == {"no_signal": 1, "ok": N - 1}
    expected = features().to(getattr(torch, identity.dtype)).float()
    assert torch.equal(read.features(0, N), expected)
    assert torch.equal(read.features(3, 9), expected[3:9])
    assert read.features(2, 2).shape == (0, D)
    block = read.features(0, 2)
    block.zero_()
    assert torch.equal(read.features(0, 2), expected[:2])
    with pytest.raises(ValueError, match="not all among"):
        read.features(0, N + 1)


def test_a_finished_folder_holds_four_files(tmp_path: Path) -> None:
    complete(tmp_path / "s")
    assert set(contents(tmp_path / "s")) == {
        "features.bin",
        "rows.parquet",
        "directions.safetensors",
        "manifest.json",
    }
    assert [path.name for path in (tmp_path / "s").iterdir() if path.is_dir()] == []


def test_bytes_are_rows_of_little_endian_numbers(tmp_path: Path) -> None:
    complete(tmp_path / "f", FLOAT32)
    raw = np.memmap(tmp_path / "f" / "features.bin", dtype="<f4", mode="r", shape=(N, D))
    np.testing.assert_array_equal(raw, features().numpy())
    complete(tmp_path / "b")
    raw = np.memmap(tmp_path / "b" / "features.bin", dtype="<u2", mode="r", shape=(N, D))
    # bfloat16 is the upper half of a float32, rounded to nearest, ties to even
    bits = features().numpy().view(np.uint32)
    np.testing.assert_array_equal(raw, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def test_directions_are_kept(tmp_path: Path) -> None:
    complete(tmp_path / "s")
    for found in (stored_directions(tmp_path / "s"), load_file(tmp_path / "s" / "directions.safetensors")):
        assert found.keys() == DIRECTIONS.keys()
        assert all(torch.equal(found[name], DIRECTIONS[name]) for name in found)
        assert directions_digest(found) == IDENTITY.directions


def test_the_digest_of_directions_covers_names_shapes_and_bytes() -> None:
    one = {"a": torch.arange(6.0).reshape(2, 3)}
    others = [
        {},
        {"b": one["a"]},
        {"a": one["a"].reshape(3, 2)},
        {"a": one["a"] + 1},
        {"a": one["a"].double()},
        one | {"b": one["a"]},
    ]
    assert len({directions_digest(each) for each in [one, *others]}) == 7
    assert directions_digest({}) == ""
    assert directions_digest({"a": one["a"].T.contiguous().T}) == directions_digest(one)


def test_the_uniform_mask_has_no_directions(tmp_path: Path) -> None:
    uniform = dataclasses.replace(IDENTITY, directions="")
    writer = begin(tmp_path / "s", uniform, directions=None)
    write(writer, 0, 1, 2)
    writer.finish()
    assert "directions.safetensors" not in contents(tmp_path / "s")
    assert stored_directions(tmp_path / "s") == {}
    with pytest.raises(ValueError, match="not those that the store's identity names"):
        begin(tmp_path / "other", uniform)
    with pytest.raises(ValueError, match="not those that the store's identity names"):
        begin(tmp_path / "another", IDENTITY, directions=None)


@pytest.mark.parametrize("identity", [IDENTITY, FLOAT32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("block", [1, 4, 5, 512])
def test_influence_in_blocks_is_that_in_memory(tmp_path: Path, identity: StoreIdentity, block: int) -> None:
    opened = complete(tmp_path / "s", identity)
    directions_VD = torch.randn(2, D, generator=torch.Generator().manual_seed(1))
    stored = opened.features(0, N).double().numpy()
    expected = stored @ directions_VD.double().numpy().T
    np.testing.assert_allclose(opened.influence(directions_VD, block), expected, rtol=1e-12)
    assert opened.influence(directions_VD, block).dtype == np.float64
    lengths = np.linalg.norm(stored, axis=1)[:, None] * directions_VD.double().norm(dim=1).numpy()
    lengths[3] = 1.0  # of the zero feature
    cosine = opened.cosine(directions_VD, block)
    np.testing.assert_allclose(cosine, expected / lengths, rtol=1e-12)
    assert (cosine[3] == 0).all()


def test_influence_reads_no_more_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = complete(tmp_path / "s")
    counts = []

    def fromfile(path: Path, dtype: str, count: int, *, offset: int) -> np.ndarray:
        counts.append(count)
        return original(path, dtype, count, offset=offset)

    original = np.fromfile
    monkeypatch.setattr(np, "fromfile", fromfile)
    opened.influence(torch.ones(1, D), block=4)
    assert counts == [4 * D, 4 * D, 3 * D]


def test_a_row_that_is_not_finite_touches_no_other(tmp_path: Path) -> None:
    features_ND = features()
    features_ND[5, 2] = torch.nan
    features_ND[6, 0] = torch.inf
    writer = begin(tmp_path / "s", shard_rows=N)
    writer.write_shard(0, features_ND, [row(i) | {"norm": float("nan")} for i in range(N)])
    opened = writer.finish()
    assert np.isnan(opened.rows().column("norm").to_pylist()).all()
    for values in (opened.influence(torch.ones(2, D)), opened.cosine(torch.ones(2, D))):
        assert np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist() == [5, 6]


def test_directions_of_another_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(V, 6\) are needed, not \(2, 7\)"):
        complete(tmp_path / "s").influence(torch.ones(2, D + 1))


def test_a_store_of_nothing(tmp_path: Path) -> None:
    writer = begin(tmp_path / "s", prompt_ids=[])
    assert writer.missing() == []
    assert writer.finish().influence(torch.ones(3, D)).shape == (0, 3)
    assert open_store(tmp_path / "s", IDENTITY).prompt_ids == []


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(StoreIdentity)])
def test_another_identity_is_refused_by_name(tmp_path: Path, field: str) -> None:
    value = getattr(IDENTITY, field)
    changed = not value if isinstance(value, bool) else "float32" if field == "dtype" else value * 2
    other = dataclasses.replace(IDENTITY, **{field: changed})
    write(begin(tmp_path / "begun"), 0)
    complete(tmp_path / "done")
    before = contents(tmp_path)
    attempts: list[Callable[[], object]] = [
        lambda: begin(tmp_path / "begun", other),
        lambda: begin(tmp_path / "done", other),
        lambda: open_store(tmp_path / "done", other),
    ]
    for attempt in attempts:
        with pytest.raises(ArtifactError, match=f"another {field} ") as caught:
            attempt()
        assert f"(have {str(value)!r}, want {str(changed)!r})" in str(caught.value)
        assert str(caught.value).count("(have ") == 1
        assert "Fix: delete" in str(caught.value)
    assert contents(tmp_path) == before


def test_equal_numbers_of_another_type_are_no_other_identity(tmp_path: Path) -> None:
    complete(tmp_path / "s", dataclasses.replace(IDENTITY, temperature=1))
    open_store(tmp_path / "s", dataclasses.replace(IDENTITY, temperature=1.0))


def test_all_that_differs_is_named(tmp_path: Path) -> None:
    complete(tmp_path / "s")
    with pytest.raises(ArtifactError, match=r"another policy \(.*\), another temperature \("):
        open_store(tmp_path / "s", dataclasses.replace(IDENTITY, policy="x", temperature=1.0))


@pytest.mark.parametrize("ids", [IDS[:-1], IDS[::-1], [*IDS[:-1], "other"]], ids=["fewer", "order", "other"])
def test_other_prompts_are_refused(tmp_path: Path, ids: list[str]) -> None:
    write(begin(tmp_path / "begun"), 0)
    complete(tmp_path / "done")
    for name in ("begun", "done"):
        with pytest.raises(ArtifactError, match="another prompts"):
            begin(tmp_path / name, prompt_ids=ids)


def test_a_shard_is_written_in_full_and_once(tmp_path: Path) -> None:
    writer, rows = begin(tmp_path / "s"), [row(i) for i in range(N)]
    wrong = [
        (features()[:3], rows[:3], "shape"),
        (features()[:5], rows[:5], "shape"),
        (features()[:4, :5], rows[:4], "shape"),
        (features()[:4], rows[:3], "one row for each"),
        (features()[:4], rows[4:8], "in their order"),
        (features()[:4], rows[3::-1], "in their order"),
        (features()[:4], [{**each, "extra": 1} for each in rows[:4]], "with"),
        (features()[:4], [{"prompt_id": each["prompt_id"]} for each in rows[:4]], "with"),
    ]
    for features_BD, given, message in wrong:
        with pytest.raises(ValueError, match=message):
            writer.write_shard(0, features_BD, given)
    for index in (-1, 3):
        with pytest.raises(ValueError, match="no shard"):
            write(writer, index)
    assert writer.missing() == [0, 1, 2]
    write(writer, 0)
    with pytest.raises(ValueError, match="shard 0 has been written already"):
        write(writer, 0)
    with pytest.raises(ValueError, match=r"shards \[1, 2\] are still to be written"):
        writer.finish()
    with pytest.raises(ValueError, match="unique"):
        begin(tmp_path / "twice", prompt_ids=["a", "a"])


def test_an_unfinished_store_cannot_be_opened(tmp_path: Path) -> None:
    write(begin(tmp_path / "s"), 0, 1, 2)
    with pytest.raises(ArtifactError, match="there is no finished features artifact"):
        open_store(tmp_path / "s")


def test_shards_in_any_order_and_of_any_size_give_the_same_files(tmp_path: Path) -> None:
    complete(tmp_path / "plain")
    writer = begin(tmp_path / "mixed", shard_rows=3)
    write(writer, 2, 0)
    resumed = begin(tmp_path / "mixed", shard_rows=5, directions=None)  # keeps the shards that were begun
    assert (resumed.shard_rows, resumed.missing()) == (3, [1, 3])
    write(resumed, 3, 1)
    resumed.finish()
    assert contents(tmp_path / "mixed") == contents(tmp_path / "plain")


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "remove data", "remove record", "cut record", "flip record", "other record", "rest"]
)
def test_what_an_interruption_damaged_is_missing(tmp_path: Path, damage: str) -> None:
    complete(tmp_path / "plain")
    folder = tmp_path / "s"
    write(begin(folder), 0, 1)
    data, record = folder / "features.bin.part", folder / "shards" / "000001.parquet.part"
    missing = [1, 2]
    match damage:
        case "flip":
            flip(data, SHARD * D * 2 + 5)
        case "truncate":
            os.truncate(data, SHARD * D * 2 + 9)
        case "remove data":
            data.unlink()
            missing = [0, 1, 2]
        case "remove record":
            record.unlink()
        case "cut record":
            os.truncate(record, record.stat().st_size // 2)
        case "flip record":
            flip(record, 12)
        case "other record":
            shutil.copy(folder / "shards" / "000000.parquet.part", record)
        case "rest":
            (folder / "shards" / ".000002.parquet.part.1.part").write_text("half")
            (folder / ".directions.safetensors.1.part").write_text("half")
            missing = [2]
    writer = begin(folder)
    assert writer.missing() == missing
    write(writer, *missing)
    writer.finish()
    assert contents(folder) == contents(tmp_path / "plain")


def test_a_record_of_other_prompts_with_equal_bytes_does_not_count(tmp_path: Path) -> None:
    writer = begin(tmp_path / "s")
    writer.write_shard(0, torch.zeros(SHARD, D), [row(i) for i in range(SHARD)])
    shutil.copy(tmp_path / "s" / "shards" / "000000.parquet.part", tmp_path / "s" / "shards" / "000001.parquet.part")
    assert begin(tmp_path / "s").missing() == [1, 2]


def test_shards_of_an_unknown_identity_do_not_count(tmp_path: Path) -> None:
    write(begin(tmp_path / "s"), 0, 1)
    (tmp_path / "s" / "shards" / "begun.json.part").unlink()
    other = dataclasses.replace(IDENTITY, policy="policy-2")
    assert begin(tmp_path / "s", other).missing() == [0, 1, 2]
    assert complete(tmp_path / "s", other).identity == other


@pytest.mark.parametrize("text", ["", '{"inputs": {"proj'])
def test_a_damaged_record_of_what_was_begun_is_named(tmp_path: Path, text: str) -> None:
    write(begin(tmp_path / "s"), 0, 1)
    (tmp_path / "s" / "shards" / "begun.json.part").write_text(text)
    with pytest.raises(ArtifactError, match=r"begun\.json\.part"):
        begin(tmp_path / "s")


class Killed(BaseException):
    pass


def test_a_kill_amid_the_bytes_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(tmp_path / "plain")
    writer = begin(tmp_path / "s")
    write(writer, 0)

    def half(path: Path, offset: int, data: memoryview) -> None:
        original(path, offset, data.cast("B")[: data.nbytes // 2])
        raise Killed

    original = module._write
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", half)
        with pytest.raises(Killed):
            write(writer, 1)
    assert begin(tmp_path / "s").missing() == [1, 2]
    complete(tmp_path / "s")
    assert contents(tmp_path / "s") == contents(tmp_path / "plain")


class Fuse:
    """Ends the process, so to say, before the n-th call of the functions that it is laid to."""

    left = 0

    def lay(self, patch: pytest.MonkeyPatch, target: Any, name: str) -> None:
        original = getattr(target, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise Killed
            return original(*arguments, **options)

        patch.setattr(target, name, call)


def killed(folder: Path, moment: int) -> bool:
    """Whether making a store is over before the given moment, at which it is killed."""
    fuse = Fuse()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "open", "mkdir", "unlink", "write_bytes", "write_text", "read_bytes", "iterdir"):
            fuse.lay(patch, Path, name)
        for target, name in ((os, "fsync"), (shutil, "rmtree"), (artifacts.pq, "write_table"), (module, "_write")):
            fuse.lay(patch, target, name)
        fuse.left = moment
        try:
            complete(folder)
        except Killed:
            return True
    return False


def test_killed_anywhere_the_store_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    complete(tmp_path / "plain")
    expected, moment, durable = contents(tmp_path / "plain"), 1, 0
    while killed(folder := tmp_path / str(moment), moment):
        if (folder / "manifest.json").exists():
            assert open_store(folder, IDENTITY).prompt_ids == IDS
        resumed = begin(folder)
        missing = resumed.missing()
        assert len(missing) <= 3 - durable, "what was durable a moment earlier is durable now"
        durable = 3 - len(missing)
        write(resumed, *missing)
        resumed.finish()
        assert contents(folder) == expected, moment
        moment += 1
    assert (durable, moment > 40) == (3, True)


def test_a_finished_folder_is_not_written_again(tmp_path: Path) -> None:
    complete(tmp_path / "s")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
    writer = begin(tmp_path / "s")
    assert writer.missing() == []
    with pytest.raises(ValueError, match="written already"):
        write(writer, 0)
    assert writer.finish() == open_store(tmp_path / "s")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()} == stamps


@pytest.mark.parametrize("name", ["features.bin", "rows.parquet", "directions.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_on_opening(tmp_path: Path, name: str, damage: str) -> None:
    complete(tmp_path / "s")
    path = tmp_path / "s" / name
    match damage:
        case "flip":
            flip(path, path.stat().st_size - 20)
        case "truncate":
            os.truncate(path, path.stat().st_size - 2)
        case "remove":
            path.unlink()
    for attempt in (open_store, begin):
        with pytest.raises(ArtifactError, match=f"(?s){name}: (differs from|is missing).*Fix: delete"):
            attempt(tmp_path / "s")


def test_damaged_directions_of_an_unfinished_store(tmp_path: Path) -> None:
    begin(tmp_path / "s")
    os.truncate(tmp_path / "s" / "directions.safetensors", 20)
    with pytest.raises(ArtifactError, match=r"directions\.safetensors: cannot be read"):
        stored_directions(tmp_path / "s")
    begin(tmp_path / "s")
    assert directions_digest(stored_directions(tmp_path / "s")) == IDENTITY.directions


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scores.parquet").write_text("precious")
    with pytest.raises(ArtifactError, match=r"no part of a feature store: scores\.parquet"):
        begin(tmp_path)
    assert contents(tmp_path) == {"scores.parquet": b"precious"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    complete(tmp_path / "plain")
    writer = begin(tmp_path / "s")
    write(writer, 0)

    def full(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    for target, name in ((os, "fsync"), (artifacts.pq, "write_table")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full)
            with pytest.raises(ArtifactError, match="no space left on the disk; everything finished so far is kept"):
                write(writer, 1)
        assert begin(tmp_path / "s").missing() == [1, 2]
    write(writer, 1, 2)  # the same process may go on, too
    writer.finish()
    assert contents(tmp_path / "s") == contents(tmp_path / "plain")


def test_another_error_of_the_disk_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = begin(tmp_path / "s")

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="broken"):
        write(writer, 0)


def test_a_disk_that_is_too_small_is_found_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
        with pytest.raises(ArtifactError, match=r"no space: the features need .* GB.*\nFix: free some space"):
            begin(tmp_path / "s")
    assert complete(tmp_path / "s").prompt_ids == IDS


@pytest.mark.parametrize("place", [-1, 12, 200])
def test_directions_that_were_changed_are_refused(tmp_path: Path, place: int) -> None:
    keep_directions(tmp_path, DIRECTIONS)
    assert stored_directions(tmp_path).keys() == DIRECTIONS.keys()
    data = bytearray((tmp_path / "directions.safetensors").read_bytes())
    data[place] ^= 1
    (tmp_path / "directions.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"directions\.safetensors"):
        stored_directions(tmp_path)
