"""Measure the influence engine against floors, round by round."""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cropi.builtin import POLICY_DIR
from cropi.console import progress, say
from cropi.lab.bench.benchmark_options import EngineOptions
from cropi.lab.bench.contender_list import FLOORS
from cropi.lab.bench.machine import describe, matmul_rate
from cropi.lab.bench.policy_shapes import forward_flops, make_policy, parameter_count, policy_config
from cropi.lab.bench.timing import per_token, quality, rates, ratios, seconds
from cropi.lab.bench.worker_rounds import Record, Worker, WorkerError, take_rounds
from cropi.lab.bench.workload import Workload, builtin_workload, random_workload, tokens_given, write_groups

WORKER = [sys.executable, "-m", "cropi.lab.bench.contenders"]


@dataclass(frozen=True)
class Scene:
    """A policy and a workload on disk, for workers to read."""

    plan: EngineOptions
    folder: Path
    policy: Path
    workload: Workload

    def question(self, contender: str) -> dict[str, Any]:
        """The content of a contender's `prepare` question."""
        return {
            "model": str(self.policy),
            "groups": str(self.folder / "train.jsonl"),
            "validation": str(self.folder / "validation.jsonl"),
            "dtype": self.plan.dtype,
            "device": self.plan.device,
            "batch_tokens": self.plan.batch_tokens,
            "threads": self.plan.threads,
            "contender": contender,
        }


def bench_engine(plan: EngineOptions) -> dict[str, Any]:
    """Measure; the result is plain JSON."""
    with tempfile.TemporaryDirectory(prefix="cropi-bench-") as folder:
        scene = _make_scene(plan, Path(folder))
        records = _measure(scene)
        return _result(scene, records)


def _make_scene(plan: EngineOptions, folder: Path) -> Scene:
    """Write the files that workers read."""
    say(f"bench  {plan.shape or 'built-in policy'}, workload {plan.workload}, {plan.prompts} prompts")
    policy = folder / "policy" if plan.shape else POLICY_DIR
    if plan.shape:
        make_policy(plan.shape, policy, dtype=plan.dtype, device=plan.device, seed=plan.seed)
    counts = {"prompts": plan.prompts, "validation": plan.validation, "seed": plan.seed}
    if plan.workload == "builtin":
        workload = builtin_workload(**counts, threads=plan.threads)
    else:
        workload = random_workload(plan.workload, **counts, vocabulary=policy_config(policy).vocab_size)
    write_groups(workload.train, folder / "train.jsonl")
    write_groups(workload.validation, folder / "validation.jsonl")
    return Scene(plan, folder, policy, workload)


def _measure(scene: Scene) -> dict[str, Record]:
    """Start all workers, one after the other, take the rounds, and ask for scores."""
    plan = scene.plan
    records = {name: Record() for name in plan.names}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        with progress("start", len(records), "workers") as bar:
            for name, record in records.items():
                worker = _start(scene, name, record, stack)
                if worker is not None:
                    workers[name] = worker
                bar.advance()
        with progress("measure", plan.rounds * len(workers), "runs") as bar:
            take_rounds(workers, records, plan.rounds, bar.advance)
        for name, worker in workers.items():
            records[name].warnings = worker.warnings()
            if name not in FLOORS and records[name].error is None:
                _ask_scores(worker, records[name], scene.folder / f"{name}.npy")
    return records


def _start(scene: Scene, contender: str, record: Record, stack: ExitStack) -> Worker | None:
    """Start a worker and load its model; on failure note the reason in its record and return None."""
    started = time.perf_counter()
    worker = stack.enter_context(Worker(WORKER, scene.folder / f"{contender}.log", threads=scene.plan.threads))
    try:
        worker.ask("prepare", **scene.question(contender))
    except WorkerError as error:
        record.error = str(error)
        return None
    record.startup_s = time.perf_counter() - started
    return worker


def _ask_scores(worker: Worker, record: Record, path: Path) -> None:
    try:
        worker.ask("scores", path=str(path))
        record.scores_N = np.load(path)
    except WorkerError as error:
        record.error = str(error)


def _result(scene: Scene, records: dict[str, Record]) -> dict[str, Any]:
    plan, config = scene.plan, policy_config(scene.policy)
    flops, rate = forward_flops(config, scene.workload.train), matmul_rate(plan.device, plan.dtype, plan.threads)
    return {
        "kind": "engine",
        "settings": plan.recorded(),
        "environment": describe(plan.device, plan.threads),
        "policy": {
            "shape": plan.shape or "builtin",
            "parameters": parameter_count(config),
            "forward_flops_per_token": flops,
            "matmul_flops_per_s": rate,
            "ceiling_2f_tokens_per_s": rate / (2 * flops),
        },
        "workload": {"name": plan.workload, **scene.workload.facts()},
        "contenders": [_row(name, scene, records, rate / flops) for name in records],
    }


def _row(name: str, scene: Scene, records: dict[str, Record], forward_ceiling: float) -> dict[str, Any]:
    """All results of one contender."""
    scores, record, workload = name not in FLOORS, records[name], scene.workload
    given = tokens_given(workload.train)
    if scores:
        given += tokens_given(workload.validation)
    floor, sketch = records.get("floor", Record()), records.get("sketch", Record())
    exact, signal_N = records.get("exact", Record()), np.array([group.has_signal for group in workload.train])
    passes = 1 if name == "forward" else 2
    timed = [1 / (cost * forward_ceiling / passes) for cost in per_token(record)]
    return {
        "name": name,
        "error": record.error,
        "warnings": record.warnings,
        "covers": ["train", "validation"] if scores else ["train"],
        "startup_s": record.startup_s,
        **rates(record, given),
        "ratio_to_floor": ratios(per_token(record), per_token(floor)),
        "seconds_to_sketch": ratios(seconds(record), seconds(sketch)) if scores else None,
        "share_of_2f_ceiling": float(np.median(timed)) if timed else None,
        **quality(record.scores_N, exact.scores_N, signal_N),
        "rounds": record.rounds,
    }
