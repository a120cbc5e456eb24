"""Do the runs of a comparison, several at once, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cropi.config import BUILTIN_POLICY, Config
from cropi.console import Progress, progress, warn
from cropi.lab.compare.compared_run import remove_checkpoints
from cropi.lab.compare.comparison_plan import Plan, Run, collected

POLL_S = 0.5
PROCESS_BYTES = 3 * 2**29  # of a process and what it imports
WEIGHTS_TIMES = 6  # the policy twice, gradients, two moments, activations
LOG_LINES = 12  # of a log, in the report of a failure
USER_ERROR = 2  # exit code


@dataclass(frozen=True)
class Failure:
    """A run that did not finish."""

    label: str
    text: str
    user_error: bool


@dataclass
class _Job:
    """A run, or a collection that runs share (`shared` is None), and its process."""

    label: str
    config: Config
    shared: Path | None = None
    needs: _Job | None = None
    steps: int = 0  # 0 for a collection
    counted: int = 0
    process: subprocess.Popen[str] | None = None
    finished: bool = False
    failure: Failure | None = None

    @property
    def ended(self) -> bool:
        return self.finished or self.failure is not None

    @property
    def log(self) -> Path:
        return self.config.folder.with_name(f"{self.config.folder.name}.log")

    def start(self, threads: int) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cropi.lab.compare.compared_run"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                start_new_session=True,  # an interrupt reaches this process alone, which decides
            )
        task = {"config": self.config.resolved(), "shared": None if self.shared is None else str(self.shared)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task) + "\n")  # stays open: its end tells the process that we are gone
        self.process.stdin.flush()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._close()

    def _close(self) -> None:
        """Close the pipe to the process; its buffer may hold a task that nobody reads any more."""
        if self.process is not None and self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()

    def poll(self) -> None:
        """Check whether the process has ended, and how."""
        code = None if self.process is None else self.process.poll()
        if code is None or self.ended:
            return
        self._close()
        self.finished = code == 0
        if code:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
            killed = [f"its process was killed by signal {-code}"] if code < 0 else []
            self.failure = Failure(self.label, "\n".join([*killed, *lines]), code == USER_ERROR)

    def count_steps(self, bar: Progress) -> None:
        """Advance the bar by the steps that are new; by all that are left once the job has ended."""
        done = self.steps
        if not self.ended:
            stream = self.config.folder / "steps.jsonl"
            done = min(self.steps, stream.read_bytes().count(b"\n") if stream.is_file() else 0)
        if done > self.counted:
            bar.advance(done - self.counted)
            self.counted = done


def execute(plan: Plan, jobs: int, *, keep_checkpoints: bool, tell: Callable[[Config], None]) -> list[Failure]:
    """Do the runs that are wanted and not finished, `jobs` at a time. Returns the failures in the plan's order.

    `tell` is called for every run that finishes.

    An interrupt ends the processes at once and is raised again; the same call then goes on from what they have written.
    """
    for run in plan.wanted:
        if run.finished and not keep_checkpoints:
            remove_checkpoints(run.config)
    queue = _jobs([run for run in plan.wanted if not run.finished])
    if not queue:
        return []
    threads, steps = max(1, len(os.sched_getaffinity(0)) // jobs), sum(job.steps for job in queue)
    try:
        with progress(f"compare: {sum(job.steps > 0 for job in queue)} runs", steps, "steps") as bar:
            while not all(job.ended for job in queue):
                _start_ready(queue, jobs, threads)
                time.sleep(POLL_S)
                for job in queue:
                    _follow(job, bar, keep_checkpoints, tell)
    finally:
        for job in queue:
            job.stop()
    return [job.failure for job in queue if job.failure is not None]


def _jobs(runs: Sequence[Run]) -> list[_Job]:
    """Jobs in the order to start: every collection before the first run that needs it."""
    found: list[_Job] = []
    shared: dict[Path, _Job] = {}
    for run in runs:
        folder = run.shared.folder
        if folder not in shared and not collected(run.shared):
            shared[folder] = _Job(f"{run.scenario} · seed {run.seed} · {run.shared.name}", run.shared)
            found.append(shared[folder])
        steps = run.config.train.steps
        found.append(_Job(run.label, run.config, folder, shared.get(folder), steps))
    return found


def _start_ready(queue: Sequence[_Job], jobs: int, threads: int) -> None:
    running = sum(job.process is not None and not job.ended for job in queue)
    for job in queue:
        ready = job.process is None and not job.ended and (job.needs is None or job.needs.finished)
        if ready and running < jobs:
            job.start(threads)
            running += 1


def _follow(job: _Job, bar: Progress, keep_checkpoints: bool, tell: Callable[[Config], None]) -> None:
    """Update a job and the bar, and report its end."""
    before = job.ended
    job.poll()
    needed = job.needs.failure if job.needs is not None else None
    if needed is not None and not job.ended:
        job.failure = Failure(job.label, f"{needed.label} failed", needed.user_error)
    job.count_steps(bar)
    if job.failure is not None and not before:
        warn(f"{job.label} failed: {job.failure.text}\n  log: {job.log}")
    if job.finished and not before and job.steps:
        tell(job.config)
        if not keep_checkpoints:
            remove_checkpoints(job.config)


def default_jobs(configs: Sequence[Config]) -> int:
    """The number of runs at once: as many as cores and memory allow; 1 on an accelerator.

    A run uses `policy.cpu_threads` cores, or all if that is unset. It needs 1.5 GiB for the process and its imports,
    and six times its weights if they are on this disk. The limit is the memory that is free now.
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
    """Size of the weights of a local policy; 0 if they are not on this disk."""
    if config.policy.path == BUILTIN_POLICY:
        return 0  # 0.9 M parameters: nothing beside the process
    folder = Path(config.policy.path).expanduser()
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
