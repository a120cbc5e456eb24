"""Rollouts of other trainers as trajectories: what a run has sampled, written as a dump and read back, is the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from tests.runs import SMALL, grpo_args
from trl import GRPOTrainer

from cropi.artifacts import SELECTION, read_table
from cropi.builtin import POLICY_DIR
from cropi.config.loading import load_config
from cropi.errors import ArtifactError, DataError
from cropi.exchange.dumps import import_rollouts
from cropi.exchange.export import export
from cropi.exchange.rewards import Rewards
from cropi.rollouts.shards import read_trajectories
from cropi.stages.collect import collect
from cropi.stages.run import Run
from cropi.stages.select import select

OPTIONS = ["select.strategy={type: pass_rate}", "verification.processes=1"]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Trajectories of all training prompts, with the prompts' text."""
    made = Run(load_config("quickstart", [*SMALL, *OPTIONS, f"run_dir={tmp_path_factory.mktemp('all')}"]))
    collect(made)
    made.folder.unlock()
    prompts = made.folder.train_prompts
    rows = made.trajectories.tables["train"].to_pylist()
    return [row | {"text": json.loads(prompts[row["prompt_id"]]["messages"])} for row in rows]


@pytest.fixture
def other(tmp_path: Path) -> Run:
    """A run of the same prompts with other trajectories."""
    made = Run(load_config("quickstart", [*SMALL, *OPTIONS, "collect.num_generations=4", f"run_dir={tmp_path}"]))
    collect(made)
    yield made
    made.folder.unlock()


def imported(run: Run, *paths: Path) -> Any:
    return import_rollouts(run, run.base, "base", paths)


def write_verl(path: Path, rows: list[dict[str, Any]], step: int) -> Path:
    lines = [{"input": r["text"], "output": r["completion"], "gts": None, "score": 0.0, "step": step} for r in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_trl(path: Path, rows: list[dict[str, Any]], step: int) -> Path:
    found = [{"step": step, "prompt": r["text"], "completion": r["completion"], "advantage": 0.0} for r in rows]
    parquet.write_table(pa.Table.from_pylist(found), path)
    return path


@pytest.mark.parametrize("write", [write_verl, write_trl])
def test_a_dump_of_a_run_s_own_trajectories_is_these(sampled, other, write, tmp_path):
    """Tokens, verdicts, rewards, ends and log-probs, in the order sampled: all but the numbering is equal."""
    path = tmp_path / ("1.jsonl" if write is write_verl else "completions_00001.parquet")
    manifest = imported(other, write(path, sampled, 1))
    rows = {(r["prompt_id"], r["sample"]): r for r in read_trajectories(other.paths.imported)["train"].to_pylist()}
    assert len(rows) == len(sampled) == sum(manifest.counts.values())
    for expected in sampled:
        found = rows[expected["prompt_id"], expected["sample"]]
        assert found["behaviour_logprobs"] == pytest.approx(expected["behaviour_logprobs"], abs=1e-5)
        for name in ("prompt_ids", "completion_ids", "completion", "reward", "verdict", "status", "set"):
            assert found[name] == expected[name], name


def test_selections_know_of_them(sampled: list[dict[str, Any]], other: Run, tmp_path: Path) -> None:
    """Prompts have the pass rate of their imported completions."""
    imported(other, write_verl(tmp_path / "1.jsonl", sampled, 1))
    other.folder.unlock()
    other = Run(other.config)
    select(other, 0)
    other.folder.unlock()
    rows = read_table(other.paths.selection(0) / "selection.parquet", SELECTION).to_pylist()
    rates: dict[str, list[float]] = {}
    for row in sampled:
        rates.setdefault(row["prompt_id"], []).append(row["reward"])
    assert {row["prompt_id"]: row["pass_rate"] for row in rows} == pytest.approx(
        {prompt_id: sum(values) / len(values) for prompt_id, values in rates.items()}
    )


def test_the_newest_step_with_a_group_counts_and_strangers_are_counted(sampled, other, tmp_path):
    mine = [row for row in sampled if row["prompt_id"] == sampled[0]["prompt_id"]]
    stranger = mine[0] | {"text": "what is love"}
    folder = tmp_path / "dumps"
    folder.mkdir()
    write_verl(folder / "1.jsonl", [r | {"completion": "answer 1"} for r in mine], 1)
    write_verl(folder / "2.jsonl", [r | {"completion": "answer 2"} for r in mine[:3]] + [stranger], 2)
    write_verl(folder / "3.jsonl", [mine[0] | {"completion": "answer 3"}], 3)  # one completion is no group
    manifest = imported(other, folder)
    rows = read_trajectories(other.paths.imported)["train"].to_pylist()
    assert [row["completion"] for row in rows] == ["answer 2"] * 3
    assert manifest.details["left_out"] == len(mine) + 2


def test_what_was_scored_by_other_trajectories_is_in_the_way(sampled, other, tmp_path):
    path = write_verl(tmp_path / "1.jsonl", sampled, 1)
    select(other, 0)
    with pytest.raises(ArtifactError, match="made from earlier trajectories"):
        imported(other, path)


UNREADABLE = [
    ("a.jsonl", '{"prompt": "x"}\n', "not a dump of rollouts"),
    ("a.jsonl", "not json\n", "not a dump of rollouts"),
    ("a.parquet", "PAR1", "not a dump of rollouts"),
    ("a.jsonl", '{"input": "x", "output": "y", "step": 1}\n', "no two rollouts belong to one training prompt"),
]


def test_what_cannot_be_read_is_refused(other: Run, tmp_path: Path) -> None:
    for name, content, message in UNREADABLE:
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            imported(other, tmp_path / name)
    with pytest.raises(DataError, match="holds no rollouts"):
        imported(other, tmp_path / "nowhere.jsonl")


def test_what_trl_writes_while_it_trains_on_an_export_comes_back(other: Run, tmp_path: Path) -> None:
    """Export, two steps of TRL's own trainer, import: every prompt of the selection that was trained on."""
    select(other, 0)
    export(other.folder, other.paths, 0, "trl", None, tmp_path / "stage")
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "stage" / "train.parquet"), split="train")
    sizes = {"per_device_train_batch_size": 16, "num_generations": 4, "max_steps": 2, "logging_steps": 1}
    sizes |= {"max_completion_length": other.config.collect.max_completion_length, "num_completions_to_print": 0}
    trained = GRPOTrainer(
        model=str(POLICY_DIR),
        reward_funcs=Rewards({"type": "exact", "marker": "answer"}, {"processes": 1}).trl,
        args=grpo_args(tmp_path / "trained", **sizes, log_completions=True),
        train_dataset=rows,
    )
    trained.train()
    shutil.rmtree(other.paths.selection(0))
    manifest = imported(other, tmp_path / "trained" / "completions")
    assert manifest.details["prompts"] == 8
    assert manifest.details["left_out"] == 0
    found = read_trajectories(other.paths.imported)["train"].to_pylist()
    assert {row["prompt_id"] for row in found} <= set(rows["prompt_id"])
    assert {len([r for r in found if r["prompt_id"] == i]) for i in {row["prompt_id"] for row in found}} == {4}
