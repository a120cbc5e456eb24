"""What processes ask of each other: in threads that share a store, and alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.distributed.threads import together
from torch.distributed import HashStore

from cropi.artifacts import build, is_finished
from cropi.errors import ArtifactError
from cropi.ledger import Ledger
from cropi.streams import read_jsonl
from cropi.world import ALONE, OtherFailed, World, first, launched


def test_every_piece_of_work_falls_to_one_process() -> None:
    work = list(range(7))
    shares = together(lambda world: world.share(work), size=3)
    assert sorted(piece for share in shares for piece in share) == work
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert ALONE.share(work) == work


def test_all_learn_what_the_first_finds() -> None:
    found = together(lambda world: [world.from_main(lambda: {"rank": world.rank}), world.from_main(lambda: 3)], size=4)
    assert found == [[{"rank": 0}, 3]] * 4


def test_none_passes_a_barrier_before_all_have_come() -> None:
    passed: list[str] = []

    def work(world: World) -> None:
        passed.append("before")
        world.barrier()
        passed.append("after")

    together(work, size=4)
    assert passed == ["before"] * 4 + ["after"] * 4


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_ends_all_and_nobody_waits(failing: int) -> None:
    def work(world: World) -> None:
        if world.rank == failing:
            raise ArtifactError("broken")
        world.barrier()

    found = together(work, size=3)
    assert isinstance(found[failing], ArtifactError)
    others = [error for rank, error in enumerate(found) if rank != failing]
    assert all(isinstance(error, OtherFailed) and error.code == 2 for error in others)


def test_processes_that_are_started_again_do_not_take_the_dead_for_living() -> None:
    """A launcher hands on the store of those that died, however far each of them had come."""
    store = HashStore()

    def dies(world: World) -> None:
        if world.rank == 1:
            raise ArtifactError("killed")
        world.from_main(lambda: "of the dead")
        world.barrier()

    for attempt in range(3):
        together(dies, size=3, store=store)
        store.set(f"cropi/call/{store.add('cropi/calls', 1)}", f"one that died in attempt {attempt}")
    found = together(lambda world: world.from_main(lambda: "of the living"), size=3, store=store)
    assert found == ["of the living"] * 3


def test_one_of_several_failures_is_the_first() -> None:
    assert sorted(together(lambda world: world.fail(2), size=4)) == [False, False, False, True]


@pytest.mark.parametrize("shared", [False, True])
def test_an_artifact_has_one_writer_or_a_part_of_each(shared: bool, tmp_path: Path) -> None:
    made_by: list[int] = []

    def work(world: World) -> Any:
        def make(folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
            made_by.append(world.rank)
            (folder / f"part-{world.rank}").write_text(str(world.rank))
            return {"ok": 1 + world.rank}, {}

        options: dict[str, Any] = {"inputs": {}, "made_by": "test", "world": world, "shared": shared}
        return [build(tmp_path / "thing", "thing", make, **options) for _ in range(2)]

    found = together(work)
    assert sorted(made_by) == ([0, 1] if shared else [0])
    assert is_finished(tmp_path / "thing")
    manifests = [manifest for pair in found for manifest in pair]
    assert all(manifest == manifests[0] for manifest in manifests)
    assert manifests[0].counts == {"ok": 1}
    assert sorted(manifests[0].files) == (["part-0", "part-1"] if shared else ["part-0"])


def test_an_artifact_of_which_a_part_fails_is_not_finished(tmp_path: Path) -> None:
    def work(world: World) -> None:
        def make(folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
            if world.rank:
                raise ArtifactError("no space left")
            return {}, {}

        build(tmp_path / "thing", "thing", make, inputs={}, made_by="test", world=world, shared=True)

    assert [type(error) for error in together(work)] == [OtherFailed, ArtifactError]
    assert not is_finished(tmp_path / "thing")


def test_seconds_of_all_processes_are_charged_and_shares_are_read_together(tmp_path: Path) -> None:
    def work(world: World) -> None:
        ledger = Ledger(tmp_path / "ledger.jsonl", world)
        with ledger.charge_share("collect") as entry:
            entry["tokens"] = world.rank
        with ledger.charge("score") as entry:
            entry["tokens"] = 10
            world.barrier()

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
        assert (launched(), first()) == (False, True)
    with environment(monkeypatch, RANK="3", WORLD_SIZE="4"):  # a cluster's, not a launcher's
        assert (launched(), first()) == (False, True)
    with environment(monkeypatch, RANK="3", LOCAL_RANK="1", WORLD_SIZE="4"):
        assert (launched(), first()) == (True, False)
    with environment(monkeypatch, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1"):
        assert (launched(), first()) == (False, True)
