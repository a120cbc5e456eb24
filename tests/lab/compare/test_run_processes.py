"""Processes of runs that die, and the end of the process that started them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cropi.config.loading import load_config
from cropi.console import progress
from cropi.lab.compare import run_processes
from cropi.lab.compare.comparison_plan import Plan, make_plan
from cropi.lab.compare.run_processes import Failure, _Job, execute


def scripted(script: Callable[[_Job], str]) -> Callable[[_Job, int], None]:
    """Start a shell script in place of a run."""

    def start(job: _Job, threads: int) -> None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            job.process = subprocess.Popen(["sh", "-c", script(job)], stdout=log, stderr=log, text=True)

    return start


def plan(folder: Path, *strategies: str) -> Plan:
    return make_plan(["quickstart"], [], strategies, [0], folder)


def test_a_failure_has_its_log_and_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(job: _Job) -> str:
        if job.label.endswith("random"):
            return "echo the last words; kill -9 $$"
        return (
            f"mkdir -p {job.config.folder}; echo >> {job.config.folder.parent}/done; exit {2 * ('full' in job.label)}"
        )

    monkeypatch.setattr(_Job, "start", scripted(script))
    monkeypatch.setattr(run_processes, "POLL_S", 0.01)
    told: list[str] = []
    wanted = plan(tmp_path, "full", "random", "learnability")
    failures = execute(wanted, 2, keep_checkpoints=True, tell=lambda config: told.append(config.folder.name))
    assert told == ["learnability"]
    assert failures == [
        Failure("quickstart · seed 0 · full", "", True),
        Failure("quickstart · seed 0 · random", "its process was killed by signal 9\nthe last words", False),
    ]
    assert (tmp_path / "quickstart/seed-0/done").read_text().count("\n") == 4  # two shared folders, full, learnability


def test_runs_of_a_collection_that_failed_do_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Job, "start", scripted(lambda job: f"exit {job.shared is None:d}"))
    monkeypatch.setattr(run_processes, "POLL_S", 0.01)
    first, *others = execute(plan(tmp_path, "full", "random"), 1, keep_checkpoints=True, tell=lambda config: None)
    assert "shared-" in first.label
    assert [failure.text for failure in others] == [f"{first.label} failed"] * 2


def test_leaving_ends_what_is_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[_Job] = []

    def script(job: _Job) -> str:
        started.append(job)
        return "sleep 600"

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_Job, "start", scripted(script))
    monkeypatch.setattr("time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        execute(plan(tmp_path, "full"), 1, keep_checkpoints=True, tell=lambda config: None)
    assert started[0].process is not None
    assert started[0].process.returncode == -9


def test_a_run_ends_with_the_comparison(tmp_path: Path) -> None:
    config = load_config("quickstart", [f"run_dir={tmp_path}"])
    task = json.dumps({"config": config.resolved(), "shared": None})
    command = [sys.executable, "-m", "cropi.lab.compare.compared_run"]
    done = subprocess.run(command, input=f"{task}\n", text=True, capture_output=True, check=False)  # closes its input
    assert done.returncode == 1
    assert not (config.folder / "trajectories").exists()


def test_steps_are_counted_from_the_stream_of_the_run(tmp_path: Path) -> None:
    config = load_config("quickstart", [f"run_dir={tmp_path}"])
    job = _Job("a", config, steps=5)
    stream = config.folder / "steps.jsonl"
    stream.parent.mkdir(parents=True)
    stream.write_text("{}\n{}\n")
    with progress("steps", 5, "steps") as bar:
        job.count_steps(bar)
        assert job.counted == 2
        job.finished = True
        job.count_steps(bar)
        assert job.counted == 5
