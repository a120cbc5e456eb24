"""Worker processes that die, and parents that do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.lab.compare.work import by_name, task

from cropi.lab.compare.pool import Pool


def ended(pool: Pool) -> dict[int, str]:
    """The next tasks that end, as by_name reports them."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = pool.wait(1.0)
        if found:
            return {key: outcome.error or "" for key, outcome in found}
    raise AssertionError("no task has ended")


def running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def pid_in(log: Path) -> int:
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(log.read_text())


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not running(pid)


def test_a_process_does_many_tasks_and_its_death_is_told_and_replaced(tmp_path: Path):
    with Pool(1, by_name) as pool:
        pids = []
        for key, name in enumerate(("one", "two", "die", "three")):
            assert pool.has_room
            pool.give(key, task(tmp_path, name))
            assert not pool.has_room
            assert pool.working == [key]
            (found,) = ended(pool).items()
            assert found[0] == key
            if name == "die":
                assert found[1] == "its process was killed by signal 9\nthe last words"
            else:
                pids.append(int(found[1].split()[0]))
                assert found[1].endswith(name)
        assert pids[0] == pids[1] != pids[2]


def test_leaving_ends_what_is_running_at_once(tmp_path: Path):
    pids = []

    def interrupted() -> None:
        with Pool(2, by_name) as pool:
            pool.give(0, task(tmp_path, "sleep"))
            pids.append(pid_in(tmp_path / "sleep" / "log.txt"))
            assert running(pids[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert gone(pids[0])


def test_workers_do_not_outlive_a_parent_that_was_killed(tmp_path: Path):
    command = [sys.executable, "-m", "tests.lab.compare.work", str(tmp_path)]
    root = Path(__file__).resolve().parents[3]
    parent = subprocess.Popen(command, cwd=root, env=os.environ)
    pid = pid_in(tmp_path / "sleep" / "log.txt")
    parent.send_signal(signal.SIGKILL)
    parent.wait(timeout=20)
    assert gone(pid)
