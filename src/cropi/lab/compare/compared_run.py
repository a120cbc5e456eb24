"""One run of a comparison, or the collection that several runs share, in a process of its own.

The process reads its task, one line of JSON, from standard input. Its output goes to the log. When standard input ends,
the comparison has ended, and the process ends with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from cropi.artifacts import is_finished, write_json, write_sealed
from cropi.config import Config
from cropi.config.loading import validate_config
from cropi.errors import UserError
from cropi.lab.compare.comparison_plan import BEGUN, FINISHED
from cropi.run_folder import RunFolder, StagePaths, checkpoints
from cropi.streams import Ledger, append_jsonl


def main() -> int:
    """Do the task. Returns the exit code: 2 for an error that the user can fix, 1 for any other."""
    task: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    config = validate_config(task["config"], "a run of the comparison")
    try:
        if task["shared"] is None:
            collect_shared(config)
        else:
            train_run(config, Path(task["shared"]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def collect_shared(config: Config) -> None:
    """Make prompts, trajectories and the base evaluation for all runs that share them."""
    from cropi.stages.collect import collect
    from cropi.stages.evaluate import evaluate_base
    from cropi.stages.run import Run

    run = Run(config)
    collect(run)
    evaluate_base(run)


def train_run(config: Config, shared: Path) -> None:
    """Link what is shared, train, and evaluate; `finished.json` marks the end."""
    from cropi.gradients.layer_taps import matrix_parameters
    from cropi.pipeline import train_all
    from cropi.stages.collect import collect
    from cropi.stages.run import Run

    start, folder = time.perf_counter(), config.folder
    claim = RunFolder(config)
    claim.lock()  # claims the folder, which has to be empty until then
    claim.unlock()
    link_shared(shared, folder)
    run = Run(config)
    collect(run)
    write_sealed(folder / BEGUN, {"matrix_parameters": matrix_parameters(run.base.model)})
    train_all(run)
    write_json(folder / FINISHED, {"seconds": time.perf_counter() - start})


def remove_checkpoints(config: Config) -> None:
    """Delete the checkpoints of a run, and nothing beside them."""
    folder = StagePaths(config.folder).checkpoints
    for path in checkpoints(folder, config.train.steps).values():
        shutil.rmtree(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def link_shared(shared: Path, folder: Path) -> None:
    """Link the shared artifacts into a run and copy the ledger's lines of that work. Repeating it changes nothing.

    Files are hard links, or copies where the file system has none: a run never changes a file in place but streams.
    The ledger comes first and manifests last, so the next attempt completes what an interruption left.
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


if __name__ == "__main__":
    sys.exit(main())
