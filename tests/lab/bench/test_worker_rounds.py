import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from cropi.lab.bench.worker_rounds import Record, take_rounds

RUNS: list[int] = []
FAULTS: dict[str, int] = {}  # of this process: the run at which it does so


def prepare(**faults: int) -> None:
    FAULTS.update(faults)


def run() -> dict[str, Any]:
    RUNS.append(len(RUNS) + 1)
    if len(RUNS) == FAULTS.get("fails"):
        raise ValueError("no\nmore")
    if len(RUNS) == FAULTS.get("dies"):
        os._exit(3)
    return {"seconds": len(RUNS)}


def test_rounds_take_turns_and_leave_out_who_failed() -> None:
    faults = {"good": {}, "fails": {"fails": 2}, "dies": {"dies": 1}}
    records, done = {name: Record() for name in faults}, list[int]()
    workers = {name: ProcessPoolExecutor(1, mp_context=get_context("fork")) for name in faults}
    for name, own in faults.items():
        workers[name].submit(prepare, **own).result()
    take_rounds(workers, records, 3, run, lambda: done.append(1))
    for worker in workers.values():
        worker.shutdown()
    assert len(done) == 9
    assert records["good"] == Record(rounds=[{"seconds": 1}, {"seconds": 2}, {"seconds": 3}])
    assert records["fails"] == Record(rounds=[{"seconds": 1}], error="ValueError: no more")
    assert records["dies"].rounds == []
    assert records["dies"].error is not None
    assert records["dies"].error.startswith("BrokenProcessPool")
