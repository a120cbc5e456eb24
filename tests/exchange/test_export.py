"""Selections as other trainers' files, read back by these trainers' own loaders where they are at hand."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from pyarrow import parquet
from tests.runs import SMALL
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cropi.artifacts import read_jsonl
from cropi.errors import ArtifactError, ConfigError, DataError
from cropi.exchange.export import export
from cropi.exchange.formats import FORMATS, Item, messages
from cropi.exchange.rewards import Rewards
from cropi.loading import load_config
from cropi.pipeline import Pipeline
from cropi.workspace import Arm

COUNT = 12  # a quarter of 48 prompts


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Arm]:
    folder = tmp_path_factory.mktemp("run")
    options = ["select.strategy={type: pass_rate}", "baselines=[]", "verification.processes=1"]
    made = Pipeline(load_config("quickstart", [*SMALL, *options, f"run_dir={folder}"]))
    made.collect()
    arm = made.arm_at(0, None)
    made.select(arm, 0)
    made.space.unlock()
    return made, arm


def exported(selected: tuple[Pipeline, Arm], name: str, folder: Path) -> Path:
    run, arm = selected
    export(run.config, run.space, arm, 0, name, None, folder)
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return parquet.read_table(path).to_pylist() if path.suffix == ".parquet" else list(read_jsonl(path))


KEYS = {
    "trl": lambda row: (row["prompt_id"], row["prompt"], row["answer"]),
    "verl": lambda row: (
        row["extra_info"]["prompt_id"],
        row["prompt"][0]["content"],
        row["reward_model"]["ground_truth"],
    ),
    "slime": lambda row: (row["metadata"]["prompt_id"], row["prompt"], row["label"]),
    "openrlhf": lambda row: (row["prompt_id"], row["prompt"], row["label"]),
    "prime-rl": lambda row: (row["id"], row["prompt"][0]["content"], row["answer"]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_selection_best_first_and_the_held_out_prompts(
    selected: tuple[Pipeline, Arm], name: str, tmp_path: Path
) -> None:
    run, arm = selected
    folder = exported(selected, name, tmp_path / "out")
    suffix = FORMATS[name].suffix
    chosen = [row["prompt_id"] for row in read_jsonl(arm.selection(0) / "selected.jsonl")]
    assert len(chosen) == COUNT
    prompts = {row["prompt_id"]: row for row in run.space.prompt_rows}
    for split, ids in (
        ("train", chosen),
        ("validation", [i for i, row in prompts.items() if row["set"].startswith("validation")]),
        ("test", [i for i, row in prompts.items() if row["set"].startswith("test")]),
    ):
        expected = [(i, json.loads(prompts[i]["messages"]), prompts[i]["answer"]) for i in ids]
        assert [KEYS[name](row) for row in read(folder / f"{split}.{suffix}")] == expected
    why = list(read_jsonl(folder / "why.jsonl"))
    assert [row["prompt_id"] for row in why] == chosen
    assert all(row["reason"] for row in why)
    text = (folder / "README.md").read_text()
    assert f"{folder}/train.{suffix}" in text
    assert f"{COUNT} prompts" in text


def test_a_second_export_of_the_same_is_the_first_and_of_other_files_is_refused(
    selected: tuple[Pipeline, Arm], tmp_path: Path
) -> None:
    folder = exported(selected, "trl", tmp_path / "out")
    before = (folder / "train.parquet").stat().st_mtime_ns
    exported(selected, "trl", folder)
    assert (folder / "train.parquet").stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match="made from another format"):
        exported(selected, "verl", folder)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="no export"):
        exported(selected, "trl", tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.tex").exists()
    with pytest.raises(DataError, match="give one of trl, verl"):
        exported(selected, "axolotl", tmp_path / "other")


def test_trl_trains_on_it_as_datasets_load_it(selected: tuple[Pipeline, Arm], tmp_path: Path) -> None:
    folder = exported(selected, "trl", tmp_path / "out")
    rows = datasets.load_dataset("parquet", data_files=str(folder / "train.parquet"), split="train")
    assert len(rows) == COUNT
    assert rows.column_names == ["prompt", "answer", "source", "prompt_id", "extra"]
    program = "from reward import reward; print(reward(['steps 1 answer 3', 'answer 4'], answer=['3', '3']))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[1.0, 0.0]"


def test_chat_prompts_keep_their_messages() -> None:
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2 + 2?"}]
    item = Item("a1", chat, "4", "sums", {"level": 3}, "train", 7)
    assert messages(item) == chat
    assert FORMATS["verl"].row(item) == {
        "data_source": "sums",
        "prompt": chat,
        "ability": "sums",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"level": 3, "split": "train", "index": 7, "prompt_id": "a1"},
    }
    assert FORMATS["slime"].row(item) == {
        "prompt": chat,
        "label": "4",
        "metadata": {"level": 3, "prompt_id": "a1", "source": "sums"},
    }
    assert json.loads(FORMATS["prime-rl"].row(item)["extra"]) == {"level": 3}


def test_slime_reads_labels_as_text(selected: tuple[Pipeline, Arm], tmp_path: Path) -> None:
    """By the call that slime's reader makes: pandas, lines of JSON, the label as text."""
    pandas = pytest.importorskip("pandas")
    folder = exported(selected, "slime", tmp_path / "out")
    frame = pandas.read_json(folder / "train.jsonl", lines=True, dtype={"label": str})
    assert frame["label"].map(type).eq(str).all()
    assert list(frame["label"]) == [row["label"] for row in read(folder / "train.jsonl")]


def test_verl_s_own_loader_reads_it(selected: tuple[Pipeline, Arm], tmp_path: Path) -> None:
    rl_dataset = pytest.importorskip("verl.utils.dataset.rl_dataset")
    folder = exported(selected, "verl", tmp_path / "out")
    words = Tokenizer(models.WordLevel({"<eos>": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    settings = {"cache_dir": str(tmp_path / "cache"), "filter_overlong_prompts_workers": 1}
    loaded = rl_dataset.RLHFDataset(str(folder / "train.parquet"), tokenizer, settings)
    assert len(loaded) == COUNT
    rows = read(folder / "train.parquet")
    assert [loaded[n]["extra_info"]["prompt_id"] for n in range(COUNT)] == [r["extra_info"]["prompt_id"] for r in rows]
    assert [loaded[n]["index"] for n in range(COUNT)] == list(range(COUNT))


def test_verifiers_own_loader_reads_it(selected: tuple[Pipeline, Arm], tmp_path: Path) -> None:
    pytest.importorskip("verifiers.v1")
    folder = exported(selected, "prime-rl", tmp_path / "out")
    program = (
        "import asyncio, sys, types; from cropi_stage import StageTaskset, StageConfig\n"
        "tasks = list(StageTaskset(StageConfig(id='cropi_stage', path=sys.argv[1])))\n"
        "reply = types.SimpleNamespace(last_reply='so answer ' + tasks[0].data.answer)\n"
        "print(len(tasks), tasks[0].data.id, asyncio.run(tasks[0].right(reply)))\n"
    )
    command = [sys.executable, "-c", program, str(folder / "train.jsonl")]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ran.stdout.split() == [str(COUNT), read(folder / "train.jsonl")[0]["id"], "1.0"], ran.stderr


def test_rewards_in_every_trainer_s_form() -> None:
    rewards = Rewards({"type": "exact", "marker": "answer"}, {"processes": 1})
    assert rewards.verl("sums", "so answer 4", "4", extra_info={"index": 1}, unknown=2) == 1.0
    assert rewards.verl("sums", "so answer 5", "4") == 0.0
    sample = SimpleNamespace(response="answer 4", label="4", metadata=None)
    assert asyncio.run(rewards.slime(None, sample)) == 1.0
    found = rewards.openrlhf(["2 + 2 =answer 4", "answer 4answer 5"], ["2 + 2 =", "answer 4"], ["4", "4"])
    assert found["rewards"].tolist() == found["scores"].tolist() == [1.0, 0.0]
    assert asyncio.run(rewards.task("answer 4", "4", "sums", "")) == 1.0
    with pytest.raises(DataError, match="no recorded answers"):
        rewards.trl(["answer 4"])
    with pytest.raises(ConfigError, match="did you mean 'exact'"):
        Rewards({"type": "exakt"})


def test_an_unreadable_gold_answer_is_none_where_the_trainer_knows_that() -> None:
    rewards = Rewards({"type": "numeric"}, {"processes": 1})
    assert rewards.trl(["7"], answer=["seven"]) == [None]
    assert rewards.verl("sums", "7", "seven") == 0.0
