"""The real command: what is shared, what an interruption leaves, and that every run is that of `cropi run`."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import tiny_llama
from tests.runs import SMALL, cropi, cropi_error, cropi_ok, evaluations, selections

import cropi as cropi_python
from cropi.config.loading import load_config
from cropi.gradients.layer_taps import matrix_parameters
from cropi.lab.compare import compared_run
from cropi.lab.compare.compared_run import link_shared
from cropi.lab.compare.result_table import read_results
from cropi.lab.compare.run_processes import _Job, default_jobs
from cropi.pipeline import train_all
from cropi.run_tables import forget_evaluations
from cropi.stages import train
from cropi.stages.collect import collect
from cropi.stages.run import Run
from cropi.streams import Ledger, append_jsonl, read_jsonl

TINY = [
    *SMALL,
    "prompts.train=[{type: builtin, families: [sum, parity], count: 8, seed: 1}]",
    "prompts.test.sum.sources=[{type: builtin, families: [sum], count: 4, seed: 3}]",
    "prompts.test.parity={targeted: false, sources: [{type: builtin, families: [parity], count: 4, seed: 3}]}",
    "collect.num_generations=4",
    "train.steps_per_stage=2",
    "trainer.num_generations=4",
    "trainer.per_device_train_batch_size=8",
    "trainer.learning_rate=3e-4",
]
COMMAND = ["compare", "quickstart", *TINY, "--strategies", "full,influence", "--seeds", "3", "--jobs", "1"]
OUT = Path("out")


def start_here(job: _Job, threads: int) -> None:
    """Do a job at once, in this process: the imports of one of its own take longer than such a run."""
    task = json.dumps({"config": job.config.resolved(), "shared": job.shared and str(job.shared)})
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with (
        job.log.open("a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("sys.stdin", io.StringIO(task))
        patch.setattr(compared_run, "_end_with_parent", lambda: None)
        code = compared_run.main()
    job.process = subprocess.Popen(["sh", "-c", f"exit {code}"])


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that was interrupted in its second run, then ended by the same command."""
    cwd, evaluate = tmp_path_factory.mktemp("compare"), train.evaluate

    def interrupted(run: Run, model: Any, step: int) -> None:
        if run.config.folder.name == "influence":
            raise KeyboardInterrupt
        evaluate(run, model, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Job, "start", start_here)
        patch.setattr(train, "evaluate", interrupted)
        stopped = cropi(*COMMAND, "--folder", str(OUT), cwd=cwd)
        patch.setattr(train, "evaluate", evaluate)
        assert stopped.returncode == 130
        assert "the same command goes on from here" in stopped.stderr
        (cwd / "interrupted.parquet").write_bytes((cwd / OUT / "results.parquet").read_bytes())
        done = cropi_ok(*COMMAND, "--folder", str(OUT), cwd=cwd)
    (cwd / "stdout").write_text(done.stdout)
    (cwd / "stderr").write_text(done.stderr)
    return cwd


def runs(cwd: Path) -> list[Path]:
    return sorted(path.parent for path in (cwd / OUT).glob("quickstart/seed-*/*/finished.json"))


def test_an_interruption_leaves_the_finished_runs_and_the_rest_is_done_later(compared: Path) -> None:
    partial = read_results(compared / "interrupted.parquet")
    assert set(zip(*(partial.column(name).to_pylist() for name in ("seed", "strategy")), strict=True)) == {(3, "full")}
    said = (compared / "stderr").read_text()
    assert "1 of 2 runs to do" in said
    assert re.search(r"^quickstart · seed \d · \S+  accuracy [01]\.\d\d, was 0\.\d\d  ", said, flags=re.MULTILINE)
    assert re.findall(r"^\| (\S+) +\| +1 \| +[01]\.\d\d \|", said, flags=re.MULTILINE) == ["full", "influence"]
    assert [(run.parent.name, run.name) for run in runs(compared)] == [("seed-3", "full"), ("seed-3", "influence")]


def test_every_run_is_that_of_the_plain_command(compared: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    for run in runs(compared):  # the second one is the one that was interrupted
        config = load_config(str(run / "config.json"), [f"run_dir={tmp_path / run.parent.name}"])
        pipeline = Run(config)
        collect(pipeline)
        train_all(pipeline)
        assert len(evaluations(run)) == 3
        assert len(selections(run)) == 2 * 2
        assert selections(run) == selections(config.folder)
        assert evaluations(run) == evaluations(config.folder)
        pipeline.folder.unlock()


def test_what_is_shared_is_made_once_and_charged_to_those_who_read_it(compared: Path) -> None:
    table = read_results(compared / OUT / "results.parquet").to_pylist()
    folder = compared / OUT / "quickstart" / "seed-3"
    (shared,) = {path.parents[1] for path in folder.glob("shared-*/trajectories/part-*.parquet")}
    parts = sorted((shared / "trajectories").glob("part-*.parquet"))
    assert all(part.samefile(folder / "influence" / part.relative_to(shared)) for part in parts)
    assert not list((folder / "full" / "trajectories").glob("part-*"))
    entries = [e for e in Ledger(shared / "ledger.jsonl").entries() if e["phase"] == "collect"]
    last = {row["strategy"]: row for row in table if row["step"] == 4 and row["targeted"]}
    assert last["influence"]["collect_tokens"] == sum(entry["tokens"] for entry in entries) > 0
    assert last["influence"]["collect_seconds"] == pytest.approx(sum(entry["seconds"] for entry in entries))
    assert last["full"]["collect_tokens"] == last["full"]["score_tokens"] == last["full"]["collect_flops"] == 0
    assert last["influence"]["score_tokens"] > 0


def test_the_table_has_verdicts_and_growing_costs(compared: Path) -> None:
    table = read_results(compared / OUT / "results.parquet").to_pylist()
    assert len(table) == 2 * 3 * 2  # strategies, evaluations, sets
    for row in table:
        assert row["targeted"] == (row["set"] == "sum")
        assert len(row["correct"]) == 4
        assert set(row["correct"]) <= {0.0, 1.0}
        if row["step"] == 0:
            assert row["flops"] == row["train_seconds"] == row["collect_tokens"] == 0
        else:
            assert row["flops"] == row["collect_flops"] + row["score_flops"] + row["train_flops"]
    for strategy in ("full", "influence"):
        own = [row for row in table if row["strategy"] == strategy and row["set"] == "sum"]
        assert [row["step"] for row in own] == [0, 2, 4]
        assert own[0]["flops"] < own[1]["flops"] < own[2]["flops"]
        assert own[0]["train_tokens"] < own[1]["train_tokens"] < own[2]["train_tokens"]
    assert len({row["questions"] for row in table if row["set"] == "sum"}) == 1


def test_finished_runs_keep_no_checkpoints_and_their_output(compared: Path) -> None:
    for run in runs(compared):
        assert not list(run.glob("checkpoints/*"))
        assert "train" in run.with_name(f"{run.name}.log").read_text()
    assert "selection of" not in (compared / "stderr").read_text()


def test_the_result_is_printed_written_and_read_back(compared: Path) -> None:
    printed = (compared / "stdout").read_text()
    assert "influence" in printed
    again = cropi_ok("compare", "--results", str(OUT / "results.parquet"), "--json", cwd=compared)
    assert json.loads(again.stdout) == json.loads((compared / OUT / "compare.json").read_text())


def test_what_runs_had_reached_can_be_compared_before_they_are_finished(compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared / OUT, tmp_path / OUT)
    stopped = tmp_path / OUT / "quickstart" / "seed-3" / "influence"  # as though interrupted in its second stage
    (stopped / "finished.json").unlink()
    forget_evaluations(stopped / "evaluations", 2)

    everything = read_results(compared / OUT / "results.parquet").to_pylist()
    for step, number in ((2, 2), (4, 1)):
        done = cropi_ok("compare", "--folder", str(OUT), "--up-to-step", str(step), "--json", cwd=tmp_path)
        made = tmp_path / OUT / f"step-{step}"
        rows = read_results(made / "results.parquet").to_pylist()
        assert len({row["strategy"] for row in rows}) == number
        assert rows == [row for row in everything if row["step"] <= step and (number == 2 or row["strategy"] == "full")]
        assert json.loads(done.stdout)["up_to_step"] == step
        assert f"| cut at step | {step} |" in (made / "compare.md").read_text()

    of_folder = json.loads((tmp_path / OUT / "step-2" / "compare.json").read_text())
    shutil.rmtree(tmp_path / OUT / "step-2")
    table = str(OUT / "results.parquet")  # of the runs when all were finished
    printed = cropi("compare", "--results", table, "--up-to-step", "2", cwd=tmp_path).stdout
    assert json.loads((tmp_path / OUT / "step-2" / "compare.json").read_text()) == of_folder
    assert "Results up to step 2; unfinished runs are included" in printed


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--folder", "out", "--up-to-step", "3"], "no run was evaluated after 3 steps"),
        (["--folder", "elsewhere", "--up-to-step", "2"], "there is no comparison here"),
        (["quickstart", "--up-to-step", "2"], "both configs and --up-to-step are given"),
        (["seed=1"], "no config is named"),
    ],
)
def test_what_cannot_be_compared_is_said(compared: Path, asked: list[str], said: str) -> None:
    done = cropi_error("compare", *asked, cwd=compared)
    assert said in done.stderr
    if "3" in asked:
        assert "name one of these: 2, 4" in done.stderr


def test_more_can_be_asked_for_and_a_failing_run_stops_no_other(compared, tmp_path, monkeypatch):
    """The run that does not fail is in a process of its own."""
    start = _Job.start
    monkeypatch.setattr(
        _Job, "start", lambda job, threads: (start if "short" in job.label else start_here)(job, threads)
    )
    shutil.copytree(compared / OUT, tmp_path / OUT)
    damaged = tmp_path / OUT / "quickstart" / "seed-3"
    (tmp_path / "huge.yaml").write_text("{trainer: {learning_rate: 1.0e+30}, select: {strategy: {type: full}}}")
    (tmp_path / "short.yaml").write_text("{trainer: {learning_rate: 1.0e-3}, select: {strategy: {type: full}}}")
    command = ["compare", "quickstart", *TINY, "--strategies", "huge.yaml,short.yaml", "--seeds", "3", "--jobs", "1"]
    done = cropi_error(*command, "--folder", str(OUT), cwd=tmp_path)
    assert "quickstart · seed 3 · huge failed" in done.stderr
    assert "the policy has diverged" in done.stderr
    assert "1 of 2 runs failed" in done.stderr
    assert not (damaged / "huge" / "finished.json").exists()
    strategies = set(read_results(tmp_path / OUT / "results.parquet").column("strategy").to_pylist())
    assert strategies == {"full", "influence", "short"}


def test_linking_twice_changes_nothing_and_mends_what_was_cut_short(tmp_path: Path) -> None:
    shared, run = tmp_path / "shared", tmp_path / "run"
    made = ("prompts/prompts.parquet", "trajectories/part-0.parquet", "trajectories/part-1.parquet")
    for name in (*made, "evaluations/step-000000.parquet"):
        (shared / name).parent.mkdir(parents=True, exist_ok=True)
        (shared / name).write_text(name)
        (shared / name).with_name("manifest.json").write_text("{}")
    for row in (
        {"stage": None, "phase": "collect"},
        {"stage": None, "phase": "evaluate"},
        {"stage": 0, "phase": "score"},
    ):
        append_jsonl(shared / "ledger.jsonl", row)
    (run / "trajectories").mkdir(parents=True)
    (run / "trajectories" / "part-0.parquet").write_text("cut sh")
    append_jsonl(run / "ledger.jsonl", {"stage": None, "phase": "collect"})
    link_shared(shared, run)
    assert (run / "trajectories" / "part-0.parquet").samefile(shared / "trajectories" / "part-0.parquet")
    assert [row["phase"] for row in read_jsonl(run / "ledger.jsonl")] == ["collect", "evaluate"]
    append_jsonl(run / "ledger.jsonl", {"stage": None, "phase": "more"})
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    link_shared(shared, run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert len(before) == 9


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_in_matrix_products(tied: bool) -> None:
    # By hand: 2 layers of q and o (8 x 8), k and v (4 x 8), gate, up and down (12 x 8), and the head (13 x 8).
    assert matrix_parameters(tiny_llama(tied=tied)) == 2 * (2 * 64 + 2 * 32 + 3 * 96) + 13 * 8


def test_so_many_runs_at_once_as_have_their_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    free = type("Memory", (), {"available": 64 * 2**30})
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    on_cpu = ["policy.device=cpu"]
    assert default_jobs([load_config("quickstart", on_cpu)]) == 6
    assert default_jobs([load_config("quickstart", [*on_cpu, "policy.cpu_threads=4"])]) == 1
    assert default_jobs([load_config("quickstart", [*on_cpu, "policy.cpu_threads=null"])]) == 1
    free.available = 4 * 2**30
    assert default_jobs([load_config("quickstart", on_cpu)]) == 2
    free.available = 0
    assert default_jobs([load_config("quickstart", on_cpu)]) == 1


def test_a_comparison_is_loaded_from_python_and_a_second_call_makes_no_run(compared, monkeypatch):
    monkeypatch.chdir(compared)
    before = {path: path.stat().st_mtime_ns for path in runs(compared)}
    result = cropi_python.compare("quickstart", *TINY, strategies=["full", "influence"], seeds=[3], folder=OUT)
    assert {path: path.stat().st_mtime_ns for path in runs(compared)} == before
    table = read_results(OUT / "results.parquet").to_pylist()
    assert result.evaluations.accuracy.tolist() == [sum(row["correct"]) / len(row["correct"]) for row in table]
    assert set(result.statistics.strategy) == {"full", "influence"}
    assert "compare.html" in result._repr_html_()
    assert result.run("influence", seed=3).summary.finished
