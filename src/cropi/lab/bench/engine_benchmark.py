"""Measure the influence engine against floors, round by round."""

from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from cropi.builtin import POLICY_DIR
from cropi.console import progress, say
from cropi.lab.bench.benchmark_options import EngineOptions
from cropi.lab.bench.contender_list import FLOORS
from cropi.lab.bench.contender_task import Task
from cropi.lab.bench.contenders import prepare, run, scores
from cropi.lab.bench.machine import describe
from cropi.lab.bench.policy_shapes import make_policy, parameter_count, policy_config
from cropi.lab.bench.timing import per_token, quality, rates, ratios, seconds
from cropi.lab.bench.worker_rounds import Record, take_rounds
from cropi.lab.bench.workload import Workload, builtin_workload, random_workload, tokens_given


@dataclass(frozen=True)
class Scene:
    """A policy on disk, and a workload."""

    plan: EngineOptions
    policy: Path
    workload: Workload

    def task(self, contender: str) -> Task:
        plan, work = self.plan, self.workload
        assert plan.dtype
        assert plan.batch_tokens
        sizes = plan.batch_tokens, plan.threads
        return Task(str(self.policy), work.train, work.validation, plan.dtype, plan.device, *sizes, contender)


def bench_engine(plan: EngineOptions) -> dict[str, Any]:
    """Measure; the result is plain JSON."""
    with tempfile.TemporaryDirectory(prefix="cropi-bench-") as folder:
        scene = _make_scene(plan, Path(folder))
        records = _measure(scene)
        return _result(scene, records)


def _make_scene(plan: EngineOptions, folder: Path) -> Scene:
    """Make the policy and the workload."""
    say(f"bench  {plan.shape or 'built-in policy'}, workload {plan.workload}, {plan.prompts} prompts")
    assert plan.prompts
    assert plan.validation
    assert plan.dtype
    policy = folder / "policy" if plan.shape else POLICY_DIR
    if plan.shape:
        make_policy(plan.shape, policy, dtype=plan.dtype, device=plan.device, seed=plan.seed)
    counts = {"prompts": plan.prompts, "validation": plan.validation, "seed": plan.seed}
    if plan.workload == "builtin":
        workload = builtin_workload(**counts, threads=plan.threads)
    else:
        workload = random_workload(plan.workload, **counts, vocabulary=policy_config(policy).vocab_size)
    return Scene(plan, policy, workload)


def _measure(scene: Scene) -> dict[str, Record]:
    """Start all workers, one after the other, take the rounds, and ask for scores."""
    plan = scene.plan
    records = {name: Record() for name in plan.names}
    workers: dict[str, Executor] = {}
    os.environ["OMP_NUM_THREADS"] = str(plan.threads)  # of the workers, whose libraries read it when they are loaded
    with ExitStack() as stack:
        with progress("start", len(records), "workers") as bar:
            for name, record in records.items():
                started = time.perf_counter()
                worker = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
                record.ask(worker, prepare, scene.task(name))
                if record.error is None:
                    workers[name], record.startup_s = worker, time.perf_counter() - started
                bar.advance()
        with progress("measure", plan.rounds * len(workers), "runs") as bar:
            take_rounds(workers, records, plan.rounds, run, bar.advance)
        for name in workers.keys() - FLOORS.keys():
            if records[name].error is None:
                records[name].scores_N = records[name].ask(workers[name], scores)
    return records


def _result(scene: Scene, records: dict[str, Record]) -> dict[str, Any]:
    plan = scene.plan
    return {
        "kind": "engine",
        "settings": plan.recorded(),
        "environment": describe(plan.device, plan.threads),
        "policy": {"shape": plan.shape or "builtin", "parameters": parameter_count(policy_config(scene.policy))},
        "workload": {"name": plan.workload, **scene.workload.facts()},
        "contenders": [_row(name, scene, records) for name in records],
    }


def _row(name: str, scene: Scene, records: dict[str, Record]) -> dict[str, Any]:
    """All results of one contender."""
    record, workload = records[name], scene.workload
    given = tokens_given(workload.train)
    if name not in FLOORS:
        given += tokens_given(workload.validation)
    floor, sketch = records.get("floor", Record()), records.get("sketch", Record())
    exact, signal_N = records.get("exact", Record()), np.array([group.has_signal for group in workload.train])
    return {
        "name": name,
        "error": record.error,
        "covers": ["train"] if name in FLOORS else ["train", "validation"],
        "startup_s": record.startup_s,
        **rates(record, given),
        "ratio_to_floor": ratios(per_token(record), per_token(floor)),
        "seconds_to_sketch": None if name in FLOORS else ratios(seconds(record), seconds(sketch)),
        **quality(record.scores_N, exact.scores_N, signal_N),
        "rounds": record.rounds,
    }
