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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from tests.distributed import verifiers
from tests.elsewhere import Echo
from tests.runs import SMALL, cropi

from cropi.cluster import Cluster
from cropi.ledger import Ledger
from cropi.workers import Unit

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
    elsewhere = [] if address is None else ["--ray", address, "--workers", "2"]
    return [name, "quickstart", *SETTINGS, *arguments, *elsewhere]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def alone(place: Path, *arguments: str, commands: tuple[str, ...] = ("collect",)) -> Path:
    """The same run of one process."""
    cwd = place / "alone"
    cwd.mkdir()
    shutil.copy(verifiers.__file__, cwd / "verifiers.py")
    for name in commands:
        done = cropi(*command(name, None, *arguments), cwd=cwd)
        assert done.returncode == 0, done.stderr
    return cwd


def test_two_workers_collect_and_score_what_one_process_does(address: str, place: Path) -> None:
    """Every byte of trajectories, scores and selection, and what they are said to have cost."""
    for name in ("collect", "score"):
        done = cropi(*command(name, address), cwd=place)
        assert done.returncode == 0, done.stderr
        assert "ray: " in done.stderr
    done = cropi(*command("select", None), cwd=place)
    assert done.returncode == 0, done.stderr
    one = alone(place, commands=("collect", "score", "select"))
    for folder in (TRAJECTORIES, RUN / "scores"):
        assert files(place / folder) == files(one / folder)
    entries, expected = (Ledger(cwd / RUN / "ledger.jsonl").entries() for cwd in (place, one))
    assert sorted(entry.get("tokens", 0) for entry in entries) == sorted(entry.get("tokens", 0) for entry in expected)
    assert all(entry["seconds"] > 0 for entry in entries)
    done = cropi(*command("score", "nowhere:1"), cwd=place)
    assert done.returncode == 0, "a finished stage needs no cluster"


def test_a_killed_worker_costs_its_shard_and_nothing_else(address: str, place: Path) -> None:
    done = cropi(*command("collect", address, VERIFIER % "kills_once"), cwd=place)
    assert done.returncode == 0, done.stderr
    assert not psutil.pid_exists(int((place / verifiers.KILLED).read_text()))
    one = alone(place, VERIFIER % "plain")
    assert shards(place) == shards(one)
    assert len(shards(place)) == SHARDS
    assert len(Ledger(place / RUN / "ledger.jsonl").entries()) == SHARDS


def test_a_worker_killed_while_it_scores_changes_no_score(address: str, place: Path) -> None:
    assert cropi(*command("collect", None), cwd=place).returncode == 0
    killer = ThreadPoolExecutor(1).submit(kill_a_working_actor)
    done = cropi(*command("score", address), cwd=place)
    assert done.returncode == 0, done.stderr
    assert killer.result() not in psutil.pids()
    one = alone(place, commands=("collect", "score"))
    assert files(place / RUN / "scores") == files(one / RUN / "scores")


def kill_a_working_actor() -> int:
    """The process of the first one that is seen with a unit in hand: Ray names processes by what they do."""
    while True:
        for process in psutil.process_iter(["cmdline"]):
            if "MapWorker(MapBatches(Actor)).submit" in " ".join(process.info["cmdline"] or ()):
                process.kill()
                return process.pid
        time.sleep(0.005)


def shards(cwd: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cwd / TRAJECTORIES).glob("part-*")}


def test_work_that_kills_every_worker_ends(address: str, place: Path) -> None:
    done = cropi(*command("collect", address, VERIFIER % "kills_always"), cwd=place)
    assert done.returncode == 2
    assert "error: --ray: the worker has died 4 times over the same piece of work" in done.stderr


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
    done = cropi(*arguments, cwd=place)
    assert done.returncode == 0, done.stderr
    assert all((place / TRAJECTORIES / name).stat().st_mtime_ns == before for name, before in kept.items())
    assert files(place / TRAJECTORIES) == files(alone(place) / TRAJECTORIES)
    assert len(Ledger(place / RUN / "ledger.jsonl").entries()) == SHARDS


def test_what_a_user_can_fix_is_said_as_anywhere(address: str, place: Path) -> None:
    done = cropi(*command("collect", address, VERIFIER % "missing"), cwd=place)
    assert done.returncode == 2
    assert done.stderr.count("error: verifier: the verifier cannot be set up") == 1
    assert "Traceback" not in done.stderr
    for elsewhere, said in (("127.0.0.1:1", "there is no cluster to be had"), ("ray://head:10001", "Ray Client")):
        done = cropi(*command("collect", elsewhere, VERIFIER % "missing"), cwd=place)
        assert done.returncode == 2
        assert f"error: --ray {elsewhere}: " in done.stderr
        assert said in done.stderr


def test_more_goes_through_than_the_cluster_holds(address: str) -> None:
    """In both directions, and past a process that keeps none of it."""
    size, count = 4 * 2**20, 150
    noise = np.random.default_rng(0)
    units = (Unit(n, pa.table({"byte": noise.integers(0, 255, size, dtype=np.uint8)}), {}) for n in range(count))
    process, most = psutil.Process(), 0
    before = process.memory_full_info().uss
    for unit in Cluster(address, 2, 0.0, cpus=1, device="cpu").each(Echo(), units):
        assert unit.rows.nbytes == size
        most = max(most, process.memory_full_info().uss - before)
    assert count * size > 2 * STORE
    assert most < STORE


def test_a_cluster_of_this_machine_ends_with_the_command(place: Path) -> None:
    done = cropi(*command("collect", "local"), cwd=place)
    assert done.returncode == 0, done.stderr
    assert "ray: 2 workers of 1 CPU each" in done.stderr
    assert not ray.is_initialized()
    assert files(place / TRAJECTORIES) == files(alone(place) / TRAJECTORIES)
