"""Collection, scores and a whole run by two processes of the real launcher, compared with those of one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.distributed.launching import launch, launch_ok
from tests.runs import SMALL, cropi_ok, evaluations, json_lines

from cropi.artifacts import write_json
from cropi.config.loading import load_config
from cropi.streams import Ledger, read_jsonl

RUN = Path("runs/quickstart")


def by_processes(count: int, *arguments: str, cwd: Path) -> str:
    """Run the command by one process or by several; it must succeed. Returns its output."""
    done = cropi_ok(*arguments, cwd=cwd) if count == 1 else launch_ok(count, *arguments, cwd=cwd)
    return done.stdout


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_two_processes_collect_what_one_collects(tmp_path: Path) -> None:
    """Every byte, and each shard by one process."""
    runs = [tmp_path / "runs" / name for name in ("one", "two")]
    for count, run in enumerate(runs, start=1):
        printed = by_processes(count, "collect", "quickstart", *SMALL, f"name={run.name}", cwd=tmp_path)
        assert printed.splitlines() == [f"runs/{run.name}/trajectories"]
    assert files(runs[0] / "trajectories") == files(runs[1] / "trajectories")
    one, two = (Ledger(run / "ledger.jsonl").entries() for run in runs)
    assert len(one) == len(two) == 4
    assert sum(entry["tokens"] for entry in one) == sum(entry["tokens"] for entry in two)
    assert (runs[1] / "ledger-001.jsonl").is_file()


@pytest.mark.slow
def test_what_a_user_can_fix_is_said_once_and_ends_all(tmp_path: Path) -> None:
    done = launch(2, "collect", "quickstart", *SMALL, "collect.max_completion_length=100000", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: collect.max_completion_length: no prompt of train fits") == 1
    assert done.stderr.count("Traceback") == 1  # the launcher's own


# Three parts of scores, and two pieces of every half of the validation set.
POOL = [
    *SMALL[3:],
    "prompts.train=[{type: builtin, families: [sum, parity, count, machine], count: 48, seed: 1, label_noise: 0.25}]",
    "prompts.validation={sum: [{type: builtin, families: [sum], count: 40, seed: 2}]}",
    SMALL[2],
]
WAYS = {
    "influence": [],
    "with errors": ["score.standard_errors=true"],
    "learnalign": ["select.strategy={type: learnalign}"],
    "exact": ["score.estimator=exact"],
    "autograd": ["score.estimator=reference"],
}


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the trajectories that all share."""
    cwd = tmp_path_factory.mktemp("collected")
    cropi_ok("collect", "quickstart", *POOL, cwd=cwd)
    return cwd


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_score_as_one(way: str, collected: Path, tmp_path: Path) -> None:
    """Scores and the selection, byte by byte."""
    settings, made = [*POOL, *WAYS[way]], []
    for count in (1, 2):
        cwd = tmp_path / str(count)
        shutil.copytree(collected, cwd)
        write_json(cwd / RUN / "config.json", load_config("quickstart", settings).resolved())
        by_processes(count, "score", "quickstart", *settings, cwd=cwd)
        cropi_ok("select", "quickstart", *settings, cwd=cwd)
        made.append([files(cwd / RUN / name) for name in ("scores", "selections")])
    assert "stage-000/scores.parquet" in made[0][0]
    assert made[0] == made[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of one process and of two."""
    folders = []
    for processes in (1, 2):
        cwd = tmp_path_factory.mktemp("run")
        printed = by_processes(processes, "run", "quickstart", *SMALL, cwd=cwd)
        assert printed.count("report: runs/quickstart/report.html") == 1
        folders.append(cwd / RUN)
    return folders


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(read_jsonl(folder / name))


@pytest.mark.slow
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


@pytest.mark.slow
def test_steps_and_metrics_are_written_once(runs: list[Path]) -> None:
    for folder in runs:
        assert [row["step"] for row in lines(folder, "steps.jsonl")] == [1, 2, 3, 4, 5, 6]
        logged = [row for row in lines(folder, "metrics.jsonl") if "reward" in row]
        assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
        means = [sum(row["rewards"]) / 32 for row in lines(folder, "rewards.jsonl")]
        assert [row["reward"] for row in logged] == pytest.approx(means)
    one, two = map(evaluations, runs)
    assert one.keys() == two.keys()
    assert one["evaluations/step-000000.parquet"] == two["evaluations/step-000000.parquet"]


@pytest.mark.slow
def test_a_run_of_two_is_read_and_gone_on_with_by_one(runs: list[Path], tmp_path: Path) -> None:
    """Its report, an explanation, and the rest of its training."""
    shutil.copytree(runs[1].parents[1], tmp_path / "copy")
    cwd = tmp_path / "copy"
    for command in (["report"], ["explain"], ["score", "--stage", "1"]):
        cropi_ok(command[0], "runs/quickstart", *command[1:], cwd=cwd)
    shutil.rmtree(cwd / RUN / "checkpoints" / "checkpoint-6")
    cropi_ok("train", "runs/quickstart", cwd=cwd)
    assert [row["step"] for row in lines(cwd / RUN, "rewards.jsonl")] == list(range(6))


@pytest.mark.slow
def test_commands_of_one_process_work_once_under_a_launcher(runs: list[Path]) -> None:
    cwd = runs[1].parents[1]
    done = launch_ok(2, "report", "runs/quickstart", cwd=cwd)
    assert done.stdout.count("report: runs/quickstart/report.html") == 1
    done = launch(2, "compare", "quickstart", cwd=cwd)
    assert done.returncode != 0
    assert "compare starts its own processes" in done.stderr
