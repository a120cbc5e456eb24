"""The process group: shares, collectives, one writer per file, and the seconds of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from cropi.artifacts import build, is_finished
from cropi.errors import ArtifactError
from cropi.parallel import ProcessGroup, Ranks, is_first_rank, launched, leave_launcher, process_group
from cropi.streams import Ledger, read_jsonl
from tests.distributed.threads import together


def test_every_piece_of_work_belongs_to_one_rank() -> None:
    work = list(range(7))
    shares = together(lambda ranks: ranks.share(work), size=3)
    assert sorted(piece for share in shares for piece in share) == work
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert process_group().share(work) == work
    assert type(process_group()) is ProcessGroup


def collectives(mesh: DeviceMesh) -> list[Any]:
    ranks = Ranks()
    sums, copies = {"a": torch.tensor([0.1, ranks.rank])}, {"b": torch.tensor([ranks.rank]), "none": torch.tensor([])}
    ranks.add(sums)
    ranks.copy_main(copies)
    found = ranks.from_main(lambda: {"rank": ranks.rank}), ranks.gather(ranks.rank)
    first = ranks.gather(ranks.fails_first())
    return [*found, sums["a"].tolist(), copies["b"].tolist(), sorted(first), ranks.facts()]


def test_ranks_of_torch_exchange_values_and_tensors(of_two: Callable[[str], list[Any]]) -> None:
    a_tenth = float(torch.tensor(0.2))
    assert of_two("collectives") == [[{"rank": 0}, [0, 1], [a_tenth, 1.0], [0], [False, True], {"processes": 2}]] * 2


@pytest.mark.parametrize("shared", [False, True])
def test_an_artifact_has_one_writer_or_a_part_of_each(shared: bool, tmp_path: Path) -> None:
    made_by: list[int] = []

    def make(ranks: ProcessGroup, folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
        made_by.append(ranks.rank)
        (folder / f"part-{ranks.rank}").write_text(str(ranks.rank))
        return {"ok": 1 + ranks.rank}, {}

    def work(ranks: ProcessGroup) -> Any:
        options: dict[str, Any] = {"inputs": {}, "made_by": "test", "shared": shared}
        return [build(tmp_path / "thing", "thing", partial(make, ranks), **options) for _ in range(2)]

    manifests = [manifest for pair in together(work) for manifest in pair]
    assert sorted(made_by) == ([0, 1] if shared else [0])
    assert is_finished(tmp_path / "thing")
    assert all(manifest == manifests[0] for manifest in manifests)
    assert manifests[0].counts == {"ok": 1}
    assert sorted(manifests[0].files) == (["part-0", "part-1"] if shared else ["part-0"])


def test_an_artifact_of_which_a_part_fails_is_not_finished(tmp_path: Path) -> None:
    def work(ranks: ProcessGroup) -> None:
        def make(folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
            if ranks.rank:
                raise ArtifactError("no space left")
            return {}, {}

        build(tmp_path / "thing", "thing", make, inputs={}, made_by="test", shared=True)

    assert [type(error) for error in together(work)] == [BrokenBarrierError, ArtifactError]
    assert not is_finished(tmp_path / "thing")


def test_seconds_of_all_ranks_are_charged(tmp_path: Path) -> None:
    def work(ranks: ProcessGroup) -> None:
        ledger = Ledger(tmp_path / "ledger.jsonl")
        with ledger.charge_share("collect") as entry:
            entry["tokens"] = ranks.rank
        with ledger.charge("score") as entry:
            entry["tokens"] = 10
            ranks.barrier()

    together(work)
    assert [row["phase"] for row in read_jsonl(tmp_path / "ledger.jsonl")] == ["collect", "score"]
    entries = Ledger(tmp_path / "ledger.jsonl").entries()
    assert [entry["tokens"] for entry in entries if entry["phase"] == "collect"] == [0, 1]
    assert [entry["processes"] for entry in entries if entry["phase"] == "score"] == [2]


@contextmanager
def environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        for name, value in values.items():
            patch.setenv(name, value)
        yield


def test_a_launcher_is_known_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with environment(monkeypatch):
        assert (launched(), is_first_rank()) == (False, True)
    with environment(monkeypatch, RANK="3", WORLD_SIZE="4"):  # a cluster's, not a launcher's
        assert (launched(), is_first_rank()) == (False, True)
    with environment(monkeypatch, RANK="3", LOCAL_RANK="1", WORLD_SIZE="4"):
        assert (launched(), is_first_rank()) == (True, False)
        assert not process_group().fails_first(), "one rank of a node reports"
        leave_launcher()
        assert (launched(), is_first_rank()) == (False, True)
    with environment(monkeypatch, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1"):
        assert (launched(), is_first_rank()) == (False, True)
