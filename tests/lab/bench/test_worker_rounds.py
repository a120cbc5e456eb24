import sys
from pathlib import Path

import pytest

from cropi.lab.bench.worker_rounds import Record, Worker, WorkerError, take_rounds

ECHO = """
import json, sys
runs = 0
for line in sys.stdin:
    question = json.loads(line)
    if question["op"] == "quit":
        break
    runs += 1
    if runs == FAIL:
        print(json.dumps({"ok": False, "error": "ValueError: no"}), flush=True)
    elif runs == DIE:
        sys.exit("out of luck")
    else:
        print(json.dumps({"seconds": runs}), flush=True)
"""


def worker(tmp_path: Path, name: str, fail: int = 0, die: int = 0) -> Worker:
    code = ECHO.replace("FAIL", str(fail)).replace("DIE", str(die))
    return Worker([sys.executable, "-c", code], tmp_path / f"{name}.log", threads=1)


def test_rounds_take_turns_and_leave_out_who_failed(tmp_path: Path) -> None:
    records = {name: Record() for name in ("good", "fails", "dies")}
    with (
        worker(tmp_path, "good") as good,
        worker(tmp_path, "fails", fail=2) as fails,
        worker(tmp_path, "dies", die=1) as dies,
    ):
        done: list[int] = []
        take_rounds({"good": good, "fails": fails, "dies": dies}, records, 3, lambda: done.append(1))
    assert len(done) == 9
    assert records["good"].rounds == [{"seconds": 1}, {"seconds": 2}, {"seconds": 3}]
    assert records["good"].error is None
    assert records["fails"].rounds == [{"seconds": 1}]
    assert records["fails"].error == "ValueError: no"
    assert records["dies"].rounds == []
    assert records["dies"].error == "its process ended with code 1: out of luck"


def test_a_worker_is_ended_when_something_else_fails(tmp_path: Path) -> None:
    held = worker(tmp_path, "held")
    with pytest.raises(KeyboardInterrupt), held:
        raise KeyboardInterrupt
    with pytest.raises(WorkerError):
        held.ask("run")
