"""kill -9 at five moments of the quickstart, then the same command: the end must be that of an uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.runs import cropi_process, evaluations, selections

pytestmark = pytest.mark.slow

RUN = Path("runs/quickstart")


def exists(pattern: str, count: int = 1) -> Callable[[Path], bool]:
    return lambda cwd: len(list((cwd / RUN).glob(pattern))) >= count


def lines(path: str, count: int) -> Callable[[Path], bool]:
    def reached(cwd: Path) -> bool:
        file = cwd / RUN / path
        return file.is_file() and file.read_bytes().count(b"\n") >= count

    return reached


# moment -> when it has come
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "collecting": exists("trajectories/part-*.parquet", 2),
    "scoring stage 0": exists("trajectories/manifest.json"),
    "training in the middle of stage 0": lines("steps.jsonl", 5),
    "scoring stage 1": exists("checkpoints/checkpoint-16/manifest.json"),
    "training in the middle of stage 2": lines("steps.jsonl", 37),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("whole")
    done = cropi_process("run", "quickstart", cwd=cwd, timeout_s=1800)
    assert done.returncode == 0, done.stderr
    return cwd / RUN


def kill_at(moment: Callable[[Path], bool], cwd: Path) -> None:
    command = [sys.executable, "-m", "cropi", "run", "quickstart"]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 1200
    while not moment(cwd):
        assert process.poll() is None, "the run ended before the moment came"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)  # into the work that begins there
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL


@pytest.mark.timeout(7200)
def test_killed_five_times_ends_like_uninterrupted(uninterrupted: Path, tmp_path: Path) -> None:
    for moment in MOMENTS.values():
        kill_at(moment, tmp_path)
    done = cropi_process("run", "quickstart", cwd=tmp_path, timeout_s=1800)
    assert done.returncode == 0, done.stderr
    ours = tmp_path / RUN
    assert selections(ours) == selections(uninterrupted)
    assert len(selections(ours)) == 3 * 2
    assert evaluations(ours) == evaluations(uninterrupted)
    assert len(evaluations(ours)) == 1 + 12
    rewards = [(f / "rewards.jsonl").read_text().splitlines() for f in (ours, uninterrupted)]
    assert [json.loads(line)["rewards"] for line in rewards[0]] == [json.loads(line)["rewards"] for line in rewards[1]]
