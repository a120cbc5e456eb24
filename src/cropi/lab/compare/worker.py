"""What a worker process does: collections and runs, one after another, until there are no more."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import TYPE_CHECKING

from cropi.artifacts import append_jsonl, is_finished, write_json, write_sealed
from cropi.config import Config
from cropi.errors import UserError
from cropi.lab.compare.plan import BEGUN, FINISHED, LOG
from cropi.ledger import Ledger
from cropi.run_folder import RunFolder, StagePaths, checkpoints

if TYPE_CHECKING:
    from torch import nn

LAST_LINES = 12  # of a log, in the report of a failure


@dataclass(frozen=True)
class Task:
    """A collection (`shared` is None) or a run that has one in common with others."""

    config: Config
    shared: Path | None
    threads: int | None  # of a computation, where the config does not say
    keep_checkpoints: bool

    @property
    def log(self) -> Path:
        """Where its console output goes."""
        return self.config.folder / LOG


@dataclass(frozen=True)
class Outcome:
    """How a task ended."""

    error: str | None = None
    user_error: bool = False  # one that the user can fix


def serve(tasks: connection.Connection, work: Callable[[Task], Outcome]) -> None:
    """Take tasks from a connection and send back outcomes, until it is closed or the parent process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError):
        while True:
            tasks.send(work(tasks.recv()))


def attempt(task: Task) -> Outcome:
    """Do a task with its console output in its log; an error becomes an outcome."""
    try:
        folder = RunFolder(task.config)
        folder.lock()  # claims the folder, which has to be empty until then
        folder.unlock()
        with _console_to(task.log):
            return _attempt(task)
    except UserError as error:
        return Outcome(str(error), True)
    except Exception as error:
        return Outcome(f"{type(error).__name__}: {error}")


def _attempt(task: Task) -> Outcome:
    try:
        if task.shared is None:
            collect_shared(task)
        else:
            train_run(task, task.shared)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return Outcome(str(error), True)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        return Outcome(last_lines(task.log))
    finally:
        gc.collect()  # a run holds its lock
    return Outcome()


def collect_shared(task: Task) -> None:
    """Prompts, trajectories and base evaluation, for all runs that have them in common."""
    from cropi.stages.collect import collect
    from cropi.stages.evaluate import evaluate_base
    from cropi.stages.run import Run

    _begin(task)
    run = Run(task.config)
    collect(run)
    evaluate_base(run)


def train_run(task: Task, shared: Path) -> None:
    """A run from its linked trajectories to its last evaluation; `finished.json` says that it is done."""
    from cropi.pipeline import train_all
    from cropi.stages.collect import collect
    from cropi.stages.run import Run

    _begin(task)
    start, folder = time.perf_counter(), task.config.folder
    link_shared(shared, folder)
    run = Run(task.config)
    collect(run)
    write_sealed(folder / BEGUN, {"matrix_parameters": matrix_parameters(run.base.model)})
    train_all(run)
    write_json(folder / FINISHED, {"seconds": time.perf_counter() - start})
    if not task.keep_checkpoints:
        remove_checkpoints(task.config)


def remove_checkpoints(config: Config) -> None:
    """Delete the checkpoints of a run, and nothing that lies beside them."""
    folder = StagePaths(config.folder).checkpoints
    for path in checkpoints(folder, config.train.stages * config.train.steps_per_stage).values():
        shutil.rmtree(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def link_shared(shared: Path, folder: Path) -> None:
    """Give a run what it has in common with others, with the ledger's lines of that work. A second time: nothing.

    Files are hard links, copies where the file system has none: nothing in a run is ever changed in place but streams.
    The ledger comes first and manifests last, so that what an interruption leaves is made whole by the next attempt.
    """
    theirs, ours = (
        [row for row in Ledger(place / "ledger.jsonl").entries() if row["stage"] is None] for place in (shared, folder)
    )
    for row in theirs[len(ours) :]:
        append_jsonl(folder / "ledger.jsonl", row)
    for name in ("prompts", "representations", "trajectories", "evaluations"):
        if (shared / name).is_dir() and not is_finished(folder / name):
            files = sorted(path for path in (shared / name).rglob("*") if path.is_file())
            for path in sorted(files, key=lambda path: path.name == "manifest.json"):
                _link(path, folder / path.relative_to(shared))


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def matrix_parameters(model: nn.Module) -> int:
    """Parameters that take part in matrix products: all of two and more axes but looked-up embeddings.

    An output head that is tied to the embeddings counts, by its own module. A mixture of experts counts all of them.
    """
    from torch import nn

    found: dict[int, int] = {}
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            found |= {id(p): p.numel() for p in module.parameters(recurse=False) if p.ndim > 1}
    return sum(found.values())


def last_lines(log: Path) -> str:
    """The end of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return "\n".join(lines[-LAST_LINES:])


def _begin(task: Task) -> None:
    """The state of a fresh process, whatever the task before has set."""
    import torch

    from cropi.console import warn_once

    warn_once.cache_clear()
    if task.threads is not None:
        torch.set_num_threads(task.threads)


@contextlib.contextmanager
def _console_to(log: Path) -> Iterator[None]:
    """All output of the process to the end of a file, that of libraries that know no Python included."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, saved in enumerate(before, start=1):
            os.dup2(saved, number)
            os.close(saved)


def _end_with_parent() -> None:
    """Die as soon as the parent has, however it did."""
    parent = parent_process()
    assert parent is not None, "a worker is started by a parent"
    connection.wait([parent.sentinel])
    os._exit(1)
