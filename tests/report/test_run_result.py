"""Runs as data frames, against the files that a fabricated run was made of."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import cropi
from cropi.errors import ArtifactError
from cropi.report.summary import summarise
from cropi.run_folder import RunFolder


@pytest.fixture(scope="module")
def result(finished: RunFolder) -> cropi.RunResult:
    return cropi.RunResult(finished.config)


def test_selections_hold_every_row_of_every_stage_with_its_text(result: cropi.RunResult) -> None:
    table = result.selections
    for stage in range(2):
        file = pq.read_table(result.folder / "selections" / f"stage-{stage:03}" / "selection.parquet")
        own = table[table.stage == stage]
        assert own.prompt_id.tolist() == file.column("prompt_id").to_pylist()
        assert own.selected.tolist() == file.column("selected").to_pylist()
        assert own.reason.dropna().tolist() == file.column("reason").drop_null().to_pylist()
    assert set(table.prompt) == {"what is 1 + 1 ?"}


def test_scores_hold_the_influence_of_every_stage(result: cropi.RunResult) -> None:
    file = pq.read_table(result.folder / "scores/stage-001/scores.parquet").to_pylist()
    own = result.scores.query("stage == 1").set_index("prompt_id")["influence/alpha"]
    expected = {row["prompt_id"]: row["influence/alpha"] for row in file}
    assert {key: value for key, value in own.items() if value == value} == {
        key: value for key, value in expected.items() if value is not None
    }


def test_evaluations_have_the_accuracies_of_the_report(result: cropi.RunResult) -> None:
    means = result.evaluations.groupby(["step", "set"]).greedy.mean()
    assert means[0, "near"] == 0.25
    assert means[8, "near"] == 1.0
    assert means[2, "far"] == 0.5


def test_costs_add_up_to_the_total_of_the_run(result: cropi.RunResult, finished: RunFolder) -> None:
    total = summarise(finished.config, finished).cost
    assert total.total
    costs = result.costs
    assert costs[costs.phase != "evaluate"].seconds.sum() == pytest.approx(total.total)
    assert costs.tokens.sum() == total.tokens


def test_a_run_shows_itself_in_a_notebook_and_escapes_what_it_shows(result: cropi.RunResult, tmp_path: Path) -> None:
    shown = result._repr_html_()
    assert "influence" in shown
    assert "<table" in shown
    moved = dataclasses.replace(result, config=result.config.model_copy(update={"run_dir": str(tmp_path / "<b>x</b>")}))
    assert "<b>" not in moved._repr_html_()
    assert "&lt;b&gt;" in moved._repr_html_()


def test_what_is_not_there_yet_is_an_empty_table(result: cropi.RunResult, tmp_path: Path, finished: RunFolder) -> None:
    run = RunFolder(finished.config.model_copy(update={"run_dir": str(tmp_path)}))
    run.lock()
    run.unlock()
    loaded = cropi.load(run.folder)
    assert loaded.costs.empty
    with pytest.raises(ArtifactError, match="no finished prompts"):
        _ = loaded.selections
    (run.folder / "prompts").symlink_to(result.folder / "prompts")
    assert list(loaded.selections.columns) == ["stage", "prompt_id", "prompt", "answer"]
    assert loaded.evaluations.empty
    assert loaded.curriculum.empty


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such run"):
        cropi.load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="no folder of a comparison"):
        cropi.load_comparison(tmp_path)


def test_every_public_name_is_there_and_documented() -> None:
    assert {name for name in cropi.__all__ if not getattr(cropi, name).__doc__} == set()
    code = "import cropi, sys; assert 'torch' not in sys.modules and 'pandas' not in sys.modules; print(dir(cropi))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'load'" in done.stdout
