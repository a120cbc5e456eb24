"""The runs of a plan on worker processes: what is shared first, each run once its own is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cropi.config import BUILTIN_POLICY, Config
from cropi.console import Progress, progress, warn
from cropi.lab.compare.plan import Plan, Run, collected
from cropi.lab.compare.pool import Pool
from cropi.lab.compare.worker import Outcome, Task, remove_checkpoints

LOOK_EVERY_S = 1.0  # how often the steps of running runs are counted
PROCESS_BYTES = 3 * 2**29  # of a process and what it imports
WEIGHTS_TIMES = 6  # the policy twice, gradients, two moments, activations


@dataclass
class _Job:
    """A task, what it waits for, and how far it has come."""

    label: str
    task: Task
    needs: _Job | None = None
    steps: int = 0  # all of them; 0 for a collection
    seen: int = 0
    outcome: Outcome | None = None

    @property
    def ready(self) -> bool:
        return self.needs is None or self.needs.outcome is not None

    @property
    def failed(self) -> bool:
        return self.outcome is not None and self.outcome.error is not None

    @property
    def blocked(self) -> Outcome | None:
        """How the job ends without having begun, if what it needs has failed."""
        if self.needs is None or self.needs.outcome is None or not self.needs.failed:
            return None
        return Outcome(f"{self.needs.label} failed", self.needs.outcome.user_error)

    def look(self, bar: Progress) -> None:
        """Count the steps that are new, all of them once the task has ended."""
        stream = self.task.config.folder / "steps.jsonl"
        written = stream.read_bytes().count(b"\n") if stream.is_file() else 0
        done = self.steps if self.outcome else min(self.steps, written)
        if done > self.seen:
            bar.advance(done - self.seen)
            self.seen = done


@dataclass(frozen=True)
class Failure:
    """A run that did not come to its end."""

    label: str
    text: str
    user_error: bool


def execute(plan: Plan, jobs: int, *, keep_checkpoints: bool) -> list[Failure]:
    """Do what is wanted and not finished, `jobs` at a time; returns what failed, in the order of the plan.

    An interrupt ends the workers at once and is passed on: the same call goes on from what they have written.
    """
    for run in plan.wanted:
        if run.finished and not keep_checkpoints:
            remove_checkpoints(run.config)
    queue = _jobs([run for run in plan.wanted if not run.finished], jobs, keep_checkpoints)
    if not queue:
        return []
    waiting = list(queue)
    runs = sum(job.steps > 0 for job in queue)
    with (
        progress(f"compare: {runs} runs", sum(job.steps for job in queue), "steps") as bar,
        Pool(min(jobs, len(queue))) as pool,
    ):
        while waiting or pool.working:
            while pool.has_room and (number := _next(waiting)) is not None:
                job = waiting.pop(number)
                if job.blocked is not None:
                    _end(job, job.blocked, bar)
                else:
                    pool.give(queue.index(job), job.task)
            for key, outcome in pool.wait(LOOK_EVERY_S):
                _end(queue[key], outcome, bar)
            for key in pool.working:
                queue[key].look(bar)
    return [
        Failure(job.label, job.outcome.error or "", job.outcome.user_error)
        for job in queue
        if job.outcome is not None and job.failed
    ]


def _jobs(runs: Sequence[Run], jobs: int, keep_checkpoints: bool) -> list[_Job]:
    """Tasks in the order they are to begin: every collection before the first run that needs it."""
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    found: list[_Job] = []
    shared: dict[Path, _Job] = {}
    for run in runs:
        folder = run.shared.folder
        if folder not in shared and not collected(run.shared):
            label = f"{run.scenario} · seed {run.seed} · {run.shared.name}"
            shared[folder] = _Job(label, Task(run.shared, None, threads, keep_checkpoints))
            found.append(shared[folder])
        task = Task(run.config, folder, threads, keep_checkpoints)
        steps = run.config.train.stages * run.config.train.steps_per_stage
        found.append(_Job(run.label, task, shared.get(folder), steps))
    return found


def _next(waiting: Sequence[_Job]) -> int | None:
    """The place of the first job that can begin."""
    return next((number for number, job in enumerate(waiting) if job.ready), None)


def _end(job: _Job, outcome: Outcome, bar: Progress) -> None:
    job.outcome = outcome
    job.look(bar)
    if job.failed:
        warn(f"{job.label} failed: {outcome.error}\n  log: {job.task.log}")


def default_jobs(configs: Sequence[Config]) -> int:
    """How many runs at once: as many as have their cores and fit into memory; 1 on an accelerator.

    The cores of a run are `policy.cpu_threads`, all where it is unset. Its memory is 1.5 GiB for a process and what it
    imports, and six times its weights, where they can be seen on the disk; it is held against what is free now.
    """
    import psutil
    import torch

    if torch.cuda.is_available() and any(config.policy.device != "cpu" for config in configs):
        return 1
    cores = len(os.sched_getaffinity(0))
    threads = max(config.policy.cpu_threads or cores for config in configs)
    need = PROCESS_BYTES + WEIGHTS_TIMES * max(_weights_bytes(config) for config in configs)
    return max(1, min(cores // threads, int(psutil.virtual_memory().available // need)))


def _weights_bytes(config: Config) -> int:
    """Size of the weights of a local policy; 0 where they are not here to be seen."""
    if config.policy.path == BUILTIN_POLICY:
        return 0  # 0.9 M parameters: nothing beside the process
    folder = Path(config.policy.path).expanduser()
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
