"""A whole run by two processes of the real launcher, compared with that of one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.distributed.launching import launch, launch_ok
from tests.runs import SMALL, cropi, cropi_ok, evaluations, json_lines, selections

from cropi.streams import read_jsonl

pytestmark = pytest.mark.slow

RUN = Path("runs/quickstart")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of one process and of two."""
    folders = []
    for processes in (1, 2):
        cwd = tmp_path_factory.mktemp("run")
        arguments = ["run", "quickstart", *SMALL]
        done = cropi(*arguments, cwd=cwd) if processes == 1 else launch(2, *arguments, cwd=cwd)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report: runs/quickstart/report.html") == 1
        folders.append(cwd / RUN)
    return folders


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(read_jsonl(folder / name))


def test_what_comes_before_training_is_the_same(runs: list[Path]) -> None:
    """Every byte of the base policy's evaluation, of the trajectories and of the first selection."""
    one, two = runs
    assert evaluations(two)["evaluations/step-000000.parquet"] == evaluations(one)["evaluations/step-000000.parquet"]
    for name in ("selection.parquet", "selected.jsonl"):
        path = f"selections/stage-000/{name}"
        assert selections(two)[path] == selections(one)[path]
    for path in sorted((one / "trajectories").iterdir()):
        assert (two / "trajectories" / path.name).read_bytes() == path.read_bytes()


def test_training_has_the_steps_and_the_batches_of_one_process(runs: list[Path]) -> None:
    """The same prompts in the same order while the selection is the same; completions are drawn by each process."""
    one, two = (lines(folder, "rewards.jsonl") for folder in runs)
    assert [row["step"] for row in two] == [row["step"] for row in one] == list(range(6))
    assert [row["prompt_ids"] for row in two[:3]] == [row["prompt_ids"] for row in one[:3]]
    assert [len(row["rewards"]) for row in two] == [32] * 6
    assert [row["prompt_tokens"] for row in two[:3]] == [row["prompt_tokens"] for row in one[:3]]
    for row in two:
        selected = runs[1] / f"selections/stage-{row['step'] // 3:03}/selected.jsonl"
        chosen = {r["prompt_id"] for r in json_lines(selected)}
        assert set(row["prompt_ids"]) <= chosen


def test_steps_and_metrics_are_written_once(runs: list[Path]) -> None:
    for folder in runs:
        assert [row["step"] for row in lines(folder, "steps.jsonl")] == [1, 2, 3, 4, 5, 6]
        logged = [row for row in lines(folder, "metrics.jsonl") if "reward" in row]
        assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
        means = [sum(row["rewards"]) / 32 for row in lines(folder, "rewards.jsonl")]
        assert [row["reward"] for row in logged] == pytest.approx(means)
    assert len(evaluations(runs[0])) == len(evaluations(runs[1]))


def test_a_run_of_two_is_read_and_gone_on_with_by_one(runs: list[Path], tmp_path: Path) -> None:
    """Its report, an explanation, and the rest of its training."""
    shutil.copytree(runs[1].parents[1], tmp_path / "copy")
    cwd = tmp_path / "copy"
    for command in (["report"], ["explain"], ["score", "--stage", "1"]):
        cropi_ok(command[0], "runs/quickstart", *command[1:], cwd=cwd)
    shutil.rmtree(cwd / RUN / "checkpoints" / "checkpoint-6")
    cropi_ok("train", "runs/quickstart", cwd=cwd)
    assert [row["step"] for row in lines(cwd / RUN, "rewards.jsonl")] == list(range(6))


def test_commands_of_one_process_work_once_under_a_launcher(runs: list[Path]) -> None:
    cwd = runs[1].parents[1]
    done = launch_ok(2, "report", "runs/quickstart", cwd=cwd)
    assert done.stdout.count("report: runs/quickstart/report.html") == 1
    done = launch(2, "compare", "quickstart", cwd=cwd)
    assert done.returncode != 0
    assert "compare starts its own processes" in done.stderr
