"""`cropi ls` over fabricated runs, and a run that gets more stages."""

import json
import shutil
from pathlib import Path

import pytest

from cropi.config.loading import load_config
from cropi.run_folder import RunFolder
from tests.report.conftest import Fabrication, fabricate_in
from tests.runs import SMALL, cropi_error, cropi_ok, evaluations, json_lines, selections


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """One finished run, one that stopped in its second stage, one that is damaged, and a folder that is no run."""
    done = fabricate_in(tmp_path / "a", Fabrication())
    early = {step: marks for step, marks in Fabrication().evaluations.items() if step <= 4}
    fabricate_in(tmp_path / "b", Fabrication(evaluations=early))
    shutil.copytree(done.folder, tmp_path / "c/small")
    (tmp_path / "c/small/steps.jsonl").write_text("")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/config.json").write_text("{}")
    return tmp_path


def listed(cwd: Path) -> dict[str, dict[str, object]]:
    return {row["run"]: row for row in json.loads(cropi_ok("ls", ".", "--json", cwd=cwd).stdout)["runs"]}


def test_runs_are_listed_with_state_accuracy_and_cost(runs: Path) -> None:
    found = listed(runs)
    assert {Path(name).parts[0]: row["state"] for name, row in found.items()} == {
        "a": "finished",
        "b": "stopped",
        "c": "unreadable",
    }
    done = next(row for name, row in found.items() if name.startswith("a"))
    assert (done["strategy"], done["steps"]) == ("influence", "8/8")
    assert str(done["accuracy"]).startswith("1.00 [")
    text = cropi_ok("ls", ".", cwd=runs).stdout
    assert "has lost lines" in text
    assert max(map(len, text.splitlines())) < 300


def test_output_folders_of_scripts_are_found(runs: Path) -> None:
    (runs / "out").mkdir()
    shutil.move(runs / "a", runs / "out/_curriculum")
    assert "out/_curriculum" in cropi_ok("ls", cwd=runs).stdout


def test_a_run_at_work_is_running(runs: Path) -> None:
    folder = next((runs / "b").rglob("config.json")).parent
    config = RunFolder(load_config(str(folder)))
    config.lock()
    assert next(row for name, row in listed(runs).items() if name.startswith("b"))["state"] == "running"
    config.unlock()
    assert next(row for name, row in listed(runs).items() if name.startswith("b"))["state"] == "stopped"


def test_an_empty_folder_and_a_missing_one_say_so(tmp_path: Path) -> None:
    assert "no runs in ." in cropi_ok("ls", ".", cwd=tmp_path).stdout
    assert "there is no such folder" in cropi_error("ls", cwd=tmp_path).stderr


def test_a_finished_run_gets_more_stages_and_is_that_of_a_long_run(tmp_path: Path) -> None:
    settings = [*SMALL, "select.strategy={type: random, redraw: true}", "train.steps_per_stage=1", "evaluate.every=1"]
    settings += ["trainer.lr_scheduler_type=constant", "prompts.test.sum.sources.0.count=4"]
    cropi_ok("run", "quickstart", *settings, "name=long", cwd=tmp_path)
    cropi_ok("run", "quickstart", *settings, "name=short", "train.stages=1", cwd=tmp_path)
    grown = cropi_ok("run", "runs/short", "train.stages=2", cwd=tmp_path)
    assert "grows from 1 to 2 stages" in grown.stderr
    assert selections(tmp_path / "runs/short") == selections(tmp_path / "runs/long")
    assert evaluations(tmp_path / "runs/short") == evaluations(tmp_path / "runs/long")
    rewards = [json_lines(tmp_path / f"runs/{name}/rewards.jsonl") for name in ("short", "long")]
    assert [row["rewards"] for row in rewards[0]] == [row["rewards"] for row in rewards[1]]
    refused = cropi_error("run", "runs/short", "train.stages=1", cwd=tmp_path)
    assert "train.stages: 2 -> 1" in refused.stderr
    again = json.loads(cropi_ok("run", "runs/short", "--json", cwd=tmp_path).stdout)  # nothing to repeat
    assert again["total_steps"] == 2
