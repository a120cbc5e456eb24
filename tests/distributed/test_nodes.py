"""Two launchers that meet, as on two nodes with a shared folder, lose a node, and make the files of one process."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
from tests.runs import SMALL, cropi_ok

from cropi.streams import Ledger

pytestmark = pytest.mark.slow

RUN = Path("runs/quickstart")
TRAJECTORIES = RUN / "trajectories"


def node(rank: int, port: int, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """The launcher of one node; that of the first holds the store."""
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint", f"localhost:{port}"]
    meeting += ["--rdzv-conf", f"is_host={rank == 0}"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node", "1", "-m", "cropi", *arguments],
        cwd=cwd,
        env=os.environ | {"NODE": str(rank)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


COLLECT = [
    "collect",
    "quickstart",
    *SMALL,
    "prompts.train=[{type: builtin, families: [sum, parity, count, machine], count: 96, seed: 1, label_noise: 0.25}]",
    "collect.shard_prompts=4",
    "trainer.ddp_timeout=60",
]
SHARDS = 96 + 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of the trajectories, by name; by one process, as two make the same."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    cropi_ok(*COLLECT, cwd=cwd)
    return {path.name: path.read_bytes() for path in (cwd / TRAJECTORIES).iterdir()}


def parts(cwd: Path) -> dict[str, int]:
    """The shards that are there, and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (cwd / TRAJECTORIES).glob("part-*.parquet")}


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("gone", [0, 1], ids=["node with the store", "node"])
def test_a_node_that_is_gone_ends_the_other_and_the_same_command_goes_on(gone, undisturbed, tmp_path):
    """By torch's own means: closed connections, and at the latest the timeout."""
    port = free_port()
    nodes = [node(rank, port, *COLLECT, cwd=tmp_path) for rank in (0, 1)]
    while len(parts(tmp_path)) < 4:
        assert all(started.poll() is None for started in nodes)
        time.sleep(0.01)
    launchers = [psutil.Process(started.pid) for started in nodes]
    families = [[launcher, *launcher.children(recursive=True)] for launcher in launchers]
    for process in families[gone]:
        process.kill()
    try:
        _, errors = nodes[1 - gone].communicate(timeout=120)
        assert nodes[1 - gone].returncode != 0
    finally:
        for process in alive([*families[0], *families[1]]):
            process.kill()
        nodes[gone].communicate()  # it has ended; this closes its pipes
    assert "same command" in errors
    finished = parts(tmp_path)
    assert 4 <= len(finished) <= SHARDS

    port = free_port()
    nodes = [node(rank, port, *COLLECT, cwd=tmp_path) for rank in (0, 1)]
    for started in nodes:
        _, text = started.communicate(timeout=300)
        assert started.returncode == 0, text
    assert {path.name: path.read_bytes() for path in (tmp_path / TRAJECTORIES).iterdir()} == undisturbed
    assert finished.items() <= parts(tmp_path).items(), "what was finished is not made again"
    charged = [e for e in Ledger(tmp_path / RUN / "ledger.jsonl").entries() if "tokens" in e]
    assert SHARDS <= len(charged) <= SHARDS + 2  # a shard of each may have been charged and not written
