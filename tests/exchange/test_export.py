"""Selections as other trainers' files, read back by these trainers' own loaders where they are at hand."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from pyarrow import parquet
from tests.runs import SMALL, cropi_error, json_lines

from cropi.builtin import POLICY_DIR
from cropi.config.loading import load_config
from cropi.errors import ArtifactError, ConfigError, DataError, PolicyError
from cropi.exchange.export import export, parquet_table
from cropi.exchange.formats import FORMATS
from cropi.exchange.rewards import Rewards, facts_of
from cropi.rewards.verifiers.python_function import SCRIPT_REWARDS
from cropi.stages.collect import collect
from cropi.stages.run import Run
from cropi.stages.select import select
from cropi.streams import append_jsonl

COUNT = 12  # a quarter of 48 prompts


OPTIONS = ["select.strategy={type: pass_rate}", "verification.processes=1"]


def made(folder: Path, *options: str) -> Run:
    run = Run(load_config("quickstart", [*SMALL, *OPTIONS, f"run_dir={folder}", *options]))
    collect(run)
    select(run, 0)
    run.folder.unlock()
    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of plain text."""
    return made(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same under a chat template that adds nothing."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(POLICY_DIR, folder / "policy with a name")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "policy with a name" / "chat_template.jinja").write_text(template)
    return made(folder, f"policy.path={folder}/policy with a name")


def exported(run: Run, name: str, folder: Path) -> Path:
    export(run.folder, run.paths, 0, name, None, folder)
    return folder


def text_of(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else prompt[0]["content"]


def read(path: Path) -> list[dict[str, Any]]:
    return parquet.read_table(path).to_pylist() if path.suffix == ".parquet" else json_lines(path)


KEYS = {
    "trl": lambda row: (row["prompt_id"], text_of(row["prompt"]), row["answer"]),
    "verl": lambda row: (
        row["extra_info"]["prompt_id"],
        row["prompt"][0]["content"],
        row["reward_model"]["ground_truth"],
    ),
    "slime": lambda row: (row["metadata"]["prompt_id"], text_of(row["prompt"]), row["label"]),
    "openrlhf": lambda row: (row["prompt_id"], text_of(row["prompt"]), json.loads(row["label"])["answer"]),
    "prime-rl": lambda row: (row["id"], row["prompt"][0]["content"], row["answer"]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_selection_best_first_and_the_held_out_prompts(selected, name, tmp_path):
    folder = exported(selected, name, tmp_path / "out")
    suffix = FORMATS[name].suffix
    chosen = [row["prompt_id"] for row in json_lines(selected.paths.selection(0) / "selected.jsonl")]
    assert len(chosen) == COUNT
    prompts = {row["prompt_id"]: row for row in selected.folder.prompt_rows}
    for split, ids in (
        ("train", chosen),
        ("validation", [i for i, row in prompts.items() if row["set"].startswith("validation")]),
        ("test", [i for i, row in prompts.items() if row["set"].startswith("test")]),
    ):
        expected = [(i, json.loads(prompts[i]["messages"]), prompts[i]["answer"]) for i in ids]
        assert [KEYS[name](row) for row in read(folder / f"{split}.{suffix}")] == expected
    why = json_lines(folder / "why.jsonl")
    assert [row["prompt_id"] for row in why] == chosen
    assert all(row["reason"] for row in why)
    text = (folder / "README.md").read_text()
    assert f"{folder}/train.{suffix}" in text
    assert f"{COUNT} prompts" in text


def test_of_a_strategy_that_chooses_batch_by_batch_what_it_drew_is_exported(tmp_path: Path) -> None:
    run = made(tmp_path, "select.strategy=cropi")  # with a selection of every usable prompt
    a, b, c, d = [row["prompt_id"] for row in run.folder.train_prompts.rows()][:4]
    with pytest.raises(ArtifactError, match=r"stage 0 has no batch yet(.|\n)*Fix: "):
        exported(run, "trl", tmp_path / "out")
    draws = [(0, [d, b], ["mean sum", "uniform"]), (0, [d, a], ["uniform", "draw sum"]), (1, [c, a], ["mean sum"] * 2)]
    for stage, ids, why in draws:
        append_jsonl(run.paths.choices, {"batch": 0, "stage": stage, "prompt_ids": ids, "why": why})
    folder = exported(run, "trl", tmp_path / "out")
    order = [d, *sorted((a, b))]
    assert [row["prompt_id"] for row in read(folder / "train.parquet")] == order
    why = json_lines(folder / "why.jsonl")
    assert [(row["prompt_id"], row["drawn"]) for row in why] == [(order[0], 2), (order[1], 1), (order[2], 1)]
    assert why[0]["reasons"] == {"largest expected gain on sum": 1, "random": 1}
    assert "most often drawn first" in (folder / "README.md").read_text()
    append_jsonl(run.paths.choices, {"batch": 2, "stage": 0, "prompt_ids": [c], "why": ["uniform"]})
    with pytest.raises(ArtifactError, match="export of another selection"):
        exported(run, "trl", folder)


def test_the_curriculum_of_a_script_is_not_exported(tmp_path: Path) -> None:
    """Its reward functions are the script's, and no other program can import them."""
    verifier = f"verifier={{type: function, path: {SCRIPT_REWARDS}}}"
    done = cropi_error("export", "quickstart", *SMALL, verifier, f"run_dir={tmp_path}", cwd=tmp_path)
    assert "the curriculum of a TRL script" in done.stderr
    assert "cropi export" not in done.stderr


def test_a_second_export_of_the_same_is_the_first_and_nothing_else_is_touched(selected, tmp_path, monkeypatch):
    folder = exported(selected, "trl", tmp_path / "out")
    before = (folder / "train.parquet").stat().st_mtime_ns
    exported(selected, "trl", folder)
    assert (folder / "train.parquet").stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match="export of another format"):
        exported(selected, "verl", folder)
    with pytest.raises(DataError, match="give one of trl, verl"):
        exported(selected, "axolotl", tmp_path / "other")
    (tmp_path / "file").write_text("years of work")
    (tmp_path / "empty").mkdir()
    exported(selected, "trl", tmp_path / "empty")
    kept = {path: path.read_bytes() for path in selected.folder.folder.rglob("*") if path.is_file()}
    for precious in (
        selected.folder.folder,
        selected.paths.folder,
        selected.paths.selection(0),
        tmp_path / "out" / "..",
        tmp_path / "file",
    ):
        with pytest.raises(ArtifactError):
            exported(selected, "trl", precious)
    assert kept == {path: path.read_bytes() for path in selected.folder.folder.rglob("*") if path.is_file()}
    assert (tmp_path / "file").read_text() == "years of work"

    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("cropi.exchange.export._Export._reward", full)
        with pytest.raises(OSError, match="No space"):
            exported(selected, "slime", tmp_path / "late")
    assert not (tmp_path / "late").exists()
    assert (exported(selected, "slime", tmp_path / "late") / "README.md").is_file()


def test_the_settings_of_the_run_are_in_the_readme(selected: Run, tmp_path: Path) -> None:
    text = (exported(selected, "verl", tmp_path / "verl out") / "README.md").read_text()
    assert f"| policy | `{selected.config.policy.path}` |" in text
    assert f"| learning_rate | `{selected.config.trainer['learning_rate']}` |" in text
    assert f"| max_completion_length | `{selected.config.collect.max_completion_length}` |" in text


def test_plain_text_is_not_for_trainers_that_know_chats_only(plain: Run, tmp_path: Path) -> None:
    for name in ("verl", "prime-rl"):
        with pytest.raises(DataError, match="plain text"):
            exported(plain, name, tmp_path / name)
    for name in ("trl", "slime", "openrlhf"):
        folder = exported(plain, name, tmp_path / name)
        assert all(isinstance(row["prompt"], str) for row in read(folder / f"train.{FORMATS[name].suffix}"))


def test_a_later_stage_begins_with_its_checkpoint(plain: Run, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no checkpoint of the start of stage 1"):
        export(plain.folder, plain.paths, 1, "trl", None, tmp_path / "out")


def test_trl_trains_on_it_as_datasets_load_it(selected: Run, tmp_path: Path) -> None:
    folder = exported(selected, "trl", tmp_path / "out")
    rows = datasets.load_dataset("parquet", data_files=str(folder / "train.parquet"), split="train")
    assert len(rows) == COUNT
    assert rows.column_names == ["prompt", "answer", "source", "prompt_id", "facts"]
    program = "from reward import reward; print(reward(['steps 1 answer 3', 'answer 4'], answer=['3', '3']))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[1.0, 0.0]"


@pytest.mark.parametrize(
    ("more", "fits"),
    [
        ({"name": "a"}, True),  # Parquet gives other messages a null, which a template does not see
        ({"tool_calls": [{"a": 1}], "content": None}, True),
        ({"content": [{"type": "text", "text": "a"}]}, False),
        ({"tool_calls": [{"a": {"b": 1}}, {"a": {"c": 1}}]}, False),
    ],
)
def test_parquet_holds_messages_as_they_are_or_refuses_them(more: dict[str, Any], fits: bool) -> None:
    prompts = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "a"} | more]]
    rows = [{"prompt": prompt, "answer": "1"} for prompt in prompts]
    if not fits:
        with pytest.raises(DataError, match="the train prompts: one Parquet column cannot hold the chat messages"):
            parquet_table(rows, "train")
        return
    for prompt, read in zip(prompts, parquet_table(rows, "train")["prompt"].to_pylist(), strict=True):
        assert [strip(message) for message in read] == [strip(message) for message in prompt]


def strip(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def rewards_of(kind: str, **settings: Any) -> Rewards:
    return Rewards({"type": kind, **settings}, {"processes": 1}, ends=["<|im_end|>", "</s>"])


def ask(rewards: Rewards, completion: str, answer: str, facts: str) -> dict[str, Any]:
    """One completion in every trainer's form, with the special tokens that some leave in it."""
    known = {"facts": facts}
    sample = SimpleNamespace(response=f"{completion}<|im_end|>", label=answer, metadata=known)
    label = json.dumps({"answer": answer, **known})
    return {
        "trl": rewards.trl([completion], answer=[answer], facts=[facts])[0],
        "verl": rewards.verl("x", completion, answer, extra_info=known | {"index": 3}),
        "slime": asyncio.run(rewards.slime(None, sample)),
        "openrlhf": rewards.openrlhf([f"q{completion}</s>\n<|im_end|>"], ["q"], [label])["rewards"].tolist()[0],
        "task": asyncio.run(rewards.task(completion, answer, facts)),
    }


def test_rewards_are_the_verifier_s_in_every_trainer_s_form() -> None:
    """By verifiers that need no more than the answer, that need the prompt, and that need the source and the extra."""
    facts = facts_of('"2 + 2 ="', "sums", "")
    for completion, expected in (("so answer 4", 1.0), ("so answer 5", 0.0)):
        assert set(ask(rewards_of("exact", marker="answer"), completion, "4", facts).values()) == {expected}
    path = "tests.rewards.functions.names_its_prompt"
    for completion, expected in (("2 + 2 = 4", 1.0), ("4", 0.0)):
        assert set(ask(rewards_of("function", path=path), completion, "4", facts).values()) == {expected}
    gym = pytest.importorskip("reasoning_gym")
    entry = gym.create_dataset("chain_sum", size=1, seed=0)[0]
    facts = facts_of(json.dumps(entry["question"]), "chain_sum", json.dumps(entry["metadata"]))
    for completion, expected in ((entry["answer"], 1.0), ("no idea", 0.0)):
        assert set(ask(rewards_of("reasoning_gym"), completion, entry["answer"], facts).values()) == {expected}


def test_threads_that_ask_for_one_are_answered_together() -> None:
    rewards = rewards_of("exact", marker="answer")
    batches: list[int] = []
    judge = rewards._judge

    def slow(rows: Any) -> Any:
        batches.append(len(rows))
        time.sleep(0.05)
        return judge(rows)

    rewards._judge = slow
    with ThreadPoolExecutor(32) as threads:
        found = list(threads.map(lambda n: rewards.verl("x", f"answer {n % 3}", "1"), range(96)))
    assert found == [float(n % 3 == 1) for n in range(96)]
    assert len(batches) < 20
    assert sum(batches) == 96


def test_what_a_verifier_raises_reaches_who_asked() -> None:
    rewards = rewards_of("exact", marker="answer")
    rewards._judge = lambda rows: 1 / 0
    with pytest.raises(ZeroDivisionError):
        rewards.verl("x", "answer 1", "1")
    with pytest.raises(DataError, match="no recorded answers"):
        rewards.trl(["answer 4"])
    with pytest.raises(DataError, match="does not begin with its prompt"):
        rewards.openrlhf(["answer 4"], ["2 + 2"], ["{}"])
    with pytest.raises(ConfigError, match="did you mean 'exact'"):
        Rewards({"type": "exakt"})


def test_an_unreadable_or_absent_gold_answer_is_none_where_the_trainer_knows_that() -> None:
    rewards = rewards_of("numeric")
    assert rewards.trl(["7", "7", "7"], answer=["seven", None, "7"]) == [None, None, 1.0]
    assert rewards.verl("sums", "7", "seven") == 0.0
