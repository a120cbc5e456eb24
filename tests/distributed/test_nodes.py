"""Two launchers that meet, as on two nodes with a shared folder."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.runs import SMALL, cropi

pytestmark = pytest.mark.slow

RUN = Path("runs/quickstart")


def node(rank: int, port: int, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint", f"localhost:{port}"]
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


def test_two_launchers_make_one_run(tmp_path: Path) -> None:
    arguments = ["score", "quickstart", *SMALL, "baselines=[]"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    for command in ("collect", "score"):
        done = cropi(command, *arguments[1:], cwd=tmp_path / "one")
        assert done.returncode == 0, done.stderr
    for command in ("collect", "score"):
        port = free_port()
        nodes = [node(rank, port, command, *arguments[1:], cwd=tmp_path / "two") for rank in (0, 1)]
        for started in nodes:
            _, errors = started.communicate(timeout=300)
            assert started.returncode == 0, errors
    for name in ("trajectories/manifest.json", "arms/influence/stages/000/scores/scores.parquet"):
        assert (tmp_path / "two" / RUN / name).read_bytes() == (tmp_path / "one" / RUN / name).read_bytes()
