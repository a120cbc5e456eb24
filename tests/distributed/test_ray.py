"""Collecting and scoring in a real Ray cluster: two nodes on this machine, with room for a worker each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.distributed import verifiers
from tests.runs import SMALL, cropi, cropi_error, cropi_ok

from cropi.streams import Ledger

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(900)]

RUN = Path("runs/quickstart")
TRAJECTORIES = RUN / "trajectories"
SHARDS = 14
STORE = 200 * 2**20  # bytes of a node's object store
SETTINGS = [*SMALL, "collect.shard_prompts=4"]
VERIFIER = "verifier={type: function, path: verifiers.%s}"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of the cluster. Its folder has a short name, as sockets lie in it."""
    from ray.cluster_utils import Cluster as Nodes

    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TMPDIR", folder)
        Path(folder, "ray").mkdir()
        node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": STORE}
        nodes = Nodes(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        nodes.add_node(**node)
        yield nodes.address
        nodes.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a run begins, with verifiers beside it."""
    shutil.copy(verifiers.__file__, tmp_path / "verifiers.py")
    return tmp_path


def command(name: str, address: str | None, *arguments: str) -> list[str]:
    workers = [] if address is None else ["--ray", address, "--workers", "2"]
    return [name, "quickstart", *SETTINGS, *arguments, *workers]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def alone(place: Path, *arguments: str, commands: tuple[str, ...] = ("collect",)) -> Path:
    """The same run of one process."""
    cwd = place / "alone"
    cwd.mkdir()
    shutil.copy(verifiers.__file__, cwd / "verifiers.py")
    for name in commands:
        cropi_ok(*command(name, None, *arguments), cwd=cwd)
    return cwd


def test_two_workers_collect_and_score_what_one_process_does(address: str, place: Path) -> None:
    """Every byte of trajectories, scores and selection, and what they are said to have cost."""
    for name in ("collect", "score"):
        cropi_ok(*command(name, address), cwd=place)
    cropi_ok(*command("select", None), cwd=place)
    one = alone(place, commands=("collect", "score", "select"))
    for folder in (TRAJECTORIES, RUN / "scores"):
        assert files(place / folder) == files(one / folder)
    entries, expected = (Ledger(cwd / RUN / "ledger.jsonl").entries() for cwd in (place, one))
    assert sorted(entry.get("tokens", 0) for entry in entries) == sorted(entry.get("tokens", 0) for entry in expected)
    assert all(entry["seconds"] > 0 for entry in entries)
    done = cropi(*command("score", "nowhere:1"), cwd=place)
    assert done.returncode == 0, "a finished stage needs no cluster"


def test_a_killed_worker_costs_its_shard_and_nothing_else(address: str, place: Path) -> None:
    cropi_ok(*command("collect", address, VERIFIER % "kills_once"), cwd=place)
    assert not psutil.pid_exists(int((place / verifiers.KILLED).read_text()))
    one = alone(place, VERIFIER % "plain")
    assert shards(place) == shards(one)
    assert len(shards(place)) == SHARDS
    assert len(Ledger(place / RUN / "ledger.jsonl").entries()) == SHARDS


def shards(cwd: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cwd / TRAJECTORIES).glob("part-*")}


def test_work_that_kills_every_worker_ends(address: str, place: Path) -> None:
    done = cropi_error(*command("collect", address, VERIFIER % "kills_always"), cwd=place)
    assert "error: --ray: a worker died 4 times" in done.stderr


def test_a_killed_driver_goes_on_where_it_stopped(address: str, place: Path) -> None:
    arguments = command("collect", address)
    with (place / "stderr.txt").open("w") as errors:
        driver = subprocess.Popen([sys.executable, "-m", "cropi", *arguments], cwd=place, stderr=errors)
        while len(shards(place)) < 2:
            assert driver.poll() is None, (place / "stderr.txt").read_text()
            time.sleep(0.02)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in (place / TRAJECTORIES).glob("part-*")}
    assert 2 <= len(kept) < SHARDS
    cropi_ok(*arguments, cwd=place)
    assert all((place / TRAJECTORIES / name).stat().st_mtime_ns == before for name, before in kept.items())
    assert files(place / TRAJECTORIES) == files(alone(place) / TRAJECTORIES)
    assert len(Ledger(place / RUN / "ledger.jsonl").entries()) == SHARDS


def test_what_a_user_can_fix_is_said_as_anywhere(address: str, place: Path) -> None:
    done = cropi_error(*command("collect", address, VERIFIER % "missing"), cwd=place)
    assert done.stderr.count("error: verifier: the verifier cannot be set up") == 1
    done = cropi_error(*command("collect", "127.0.0.1:1"), cwd=place)
    assert "error: --ray 127.0.0.1:1: cannot join the cluster" in done.stderr


def test_a_cluster_of_this_machine_ends_with_the_command(place: Path) -> None:
    cropi_ok(*command("collect", "local"), cwd=place)
    assert not ray.is_initialized()
    assert files(place / TRAJECTORIES) == files(alone(place) / TRAJECTORIES)
