"""What a process does whose neighbour, launcher or store is gone, played by threads that share a store."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tests.distributed.threads import together
from torch.distributed import HashStore

from cropi import watch
from cropi.watch import FAILED, STORE_GONE, STORE_SILENT, Watch, tell_others
from cropi.world import OtherFailed, World

LOST_S = 0.3


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "BEAT_S", 0.02)
    monkeypatch.setenv("LOCAL_RANK", "0")


class Numbered(World):
    """One of three."""

    size = 3

    def __init__(self, rank: int) -> None:
        self.rank = rank


class Watched:
    """A process's watch, and what it ends with."""

    def __init__(self, rank: int, store: Any, launcher: int = 0) -> None:
        self.text: str | None = None
        self.ended = threading.Event()
        self.watch = Watch(Numbered(rank), store, launcher, LOST_S, self._end)
        self.watch.start()

    def _end(self, text: str) -> None:
        self.text = text
        self.ended.set()


@pytest.fixture
def watched() -> Iterator[list[Watched]]:
    """Those of three processes that see each other."""
    store = HashStore()
    started = [Watched(rank, store) for rank in range(3)]
    yield started
    for one in started:
        one.watch.stop()


def test_those_that_live_are_left_alone(watched: list[Watched]) -> None:
    assert not any(one.ended.wait(LOST_S) for one in watched)


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_the_one_before_ends_with_the_name_of_a_silent_one(silent: int, watched: list[Watched]) -> None:
    watched[silent].watch.stop()
    before = watched[silent - 1]
    assert before.ended.wait(10)
    assert before.text is not None
    assert f"nothing was heard of process {silent + 1} of 3 on {os.uname().nodename} for 0.3 seconds" in before.text
    assert ("[process " in before.text) == (silent != 1)
    assert not watched[silent - 2].ended.wait(LOST_S), "one failure is told once, and the others see it where they wait"


def test_one_whose_launcher_is_gone_ends_and_tells_the_others() -> None:
    store = HashStore()
    orphan = Watched(1, store, launcher=os.getppid() + 1)
    assert orphan.ended.wait(10)
    assert orphan.text is not None
    assert "the launcher that started this process is gone" in orphan.text
    assert store.check([FAILED])


def test_one_whose_launcher_lives_goes_on() -> None:
    store = HashStore()
    child = Watched(0, store, launcher=os.getppid())
    store.set(FAILED, "1")  # so that it does not look for the other two
    assert not child.ended.wait(LOST_S)
    child.watch.stop()


class Gone:
    """A store whose holder is gone."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("Connection reset by peer")


@pytest.mark.parametrize(("local_rank", "said"), [("0", f"[process 2 of 3 on {os.uname().nodename}] "), ("1", "")])
def test_a_store_that_is_gone_ends_all_and_one_of_each_node_says_so(
    local_rank: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    lost = Watched(1, Gone())
    assert lost.ended.wait(10)
    assert lost.text == (f"{said}error: {STORE_GONE}" if said else "")
    assert tell_others(Gone(), 2) == (local_rank == "0")


class Still:
    """A store whose holder stands still: an answer takes as long as it must."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.goes_on.wait()


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_a_store_that_does_not_answer_ends_all_and_is_not_asked_again(
    local_rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    store = Still()
    kept = Watched(0, store)
    assert kept.ended.wait(10)
    assert kept.text == (f"error: {STORE_SILENT}" if local_rank == "0" else "")
    store.goes_on.set()


def test_whoever_asks_a_store_that_is_gone_learns_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(world: World) -> None:
        monkeypatch.setattr(world, "_store", Gone())
        world.barrier()

    assert [(type(error), error.why) for error in together(work)] == [(OtherFailed, STORE_GONE)] * 2
