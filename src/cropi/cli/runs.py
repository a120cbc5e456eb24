"""`cropi ls` and `cropi watch`: the runs in a folder, and one that goes on."""

from __future__ import annotations

import fcntl
import os
import time
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cropi.cli.shell import AsJson, ConfigArgument, begun_config, print_result
from cropi.errors import UserError

if TYPE_CHECKING:
    from cropi.run_folder import RunFolder

HEADER = ("run", "state", "strategy", "steps", "accuracy", "seconds", "tokens")
SCRIPTS = "*/_curriculum"  # in the output folder of a TRL script
PROBLEM = 200  # characters shown
POLL_S = 5.0


def list_runs(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of runs; those of comparisons inside are listed too.",
            show_default="runs, and output folders of TRL scripts",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder: state, strategy, targeted accuracy and cost."""
    folders = [folder] if folder else [path for path in (Path("runs"), *Path().glob(SCRIPTS)) if path.is_dir()]
    if not folders or not folders[0].is_dir():
        raise UserError("there is no such folder", where=str(folder or "runs"), fix="name the folder of runs.")
    from cropi.report.blocks import Table, text_table
    from cropi.report.wording import count

    rows = [_row(path) for place in folders for path in _runs(place)]
    cells = [[count(row[name]) if isinstance(row[name], int) else row[name] or "" for name in HEADER] for row in rows]
    notes = [f"{row['run']}: {shorten(row['problem'], PROBLEM)}" for row in rows if row["problem"]]
    lines = [text_table(Table("", HEADER, cells, left=3)), *notes] if rows else [f"no runs in {folders[0]}"]
    print_result({"runs": rows}, as_json, "\n".join(lines))


def _runs(folder: Path) -> Iterator[Path]:
    """Folders of runs, without what is inside them and what runs of a comparison share."""
    for place, inside, files in os.walk(folder):
        inside[:] = sorted(name for name in inside if not name.startswith("shared-"))
        if {"config.json", "environment.json"} <= set(files):
            inside.clear()
            yield Path(place)


def _row(folder: Path) -> dict[str, Any]:
    """One run by the names of the header, and what is wrong with it."""
    from cropi.config.loading import load_config
    from cropi.report.summary import summarise
    from cropi.report.wording import with_interval
    from cropi.run_folder import RunFolder

    row: dict[str, Any] = dict.fromkeys((*HEADER, "problem")) | {"run": str(folder)}
    try:
        config = load_config(str(folder.absolute()))
        found = summarise(config, RunFolder(config))
    except UserError as error:
        return row | {"state": "unreadable", "problem": str(error)}
    state = "running" if _is_locked(folder) else "finished" if found.finished else "stopped"
    return row | {
        "state": state,
        "strategy": found.strategy,
        "steps": f"{found.steps}/{found.total_steps}",
        "accuracy": with_interval(found.last.targeted) if found.last and found.last.targeted else None,
        "seconds": None if found.cost.total is None else round(found.cost.total),
        "tokens": found.cost.tokens,
    }


def _is_locked(folder: Path) -> bool:
    """Whether a process works on the run."""
    with (folder / "lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def watch(
    config: ConfigArgument,
    open_page: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Follow a run that another process works on, until it ends: its report, its steps, a line for every stage."""
    from cropi.run_folder import RunFolder

    loaded = begun_config(config, None)
    report = loaded.folder / "report.html"
    print(f"report: {report}", flush=True)
    if open_page and report.is_file():
        webbrowser.open(report.resolve().as_uri())
    _follow(RunFolder(loaded))


def _follow(run: RunFolder) -> None:
    """Return when the run has ended, finished or not."""
    from cropi.console import progress, say
    from cropi.report.summary import stage_line, summarise

    settings, told, alive = run.config.train, 0, True
    total, done = settings.steps, _steps(run)
    with progress(f"run {run.config.name}", total, "steps", done=done, stages=settings.stages) as bar:
        while alive:
            alive = _is_locked(run.folder)
            done, before = _steps(run), done
            bar.advance(done - before)
            if _is_settled(run) and (summary := summarise(run.config, run)).steps:
                for stage in range(told, summary.steps // settings.steps_per_stage):
                    say(stage_line(run, summary, stage))
                    told = stage + 1
            time.sleep(POLL_S if alive else 0)
    if told < settings.stages:
        say(f"nobody works on the run any more, after {done} of {total} steps; `cropi run` goes on from there")


def _steps(run: RunFolder) -> int:
    from cropi.streams import read_jsonl

    return max((row["step"] for row in read_jsonl(run.stages.steps)), default=0)


def _is_settled(run: RunFolder) -> bool:
    """Whether no evaluation is being written at the moment."""
    from cropi.run_tables import evaluation_files

    folder = run.stages.evaluations
    return len(list(folder.glob("step-*.parquet"))) == len(evaluation_files(folder))
