"""Whole runs of a chat model: its template, two tokens that end a turn, padding of its own, long completions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from cropi.artifacts import OK, TRUNCATED
from cropi.config.loading import load_config
from cropi.pipeline import train_all
from cropi.stages.collect import collect
from cropi.stages.run import Run
from cropi.stages.score import score
from tests.conftest import tiny_llama
from tests.runs import selections

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # padding and an end, start, end
WORDS = ["system", "user", "assistant", "be", "brief", "one", "two", "three", "four", "five", "\n"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} \n {{ m['content'] }} <|im_end|> \n {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant \n {% endif %}"
)
LENGTH, CONTEXT = 40, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with its tokenizer, and prompts."""
    place = tmp_path_factory.mktemp("chat")
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="be"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(place)
    sizes = {"vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "eos_token_id": 2}
    model = tiny_llama(tied=False, dtype=torch.float32, initializer_range=0.3, **sizes)
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0, repetition_penalty=5.0)
    model.save_pretrained(place)
    for name, numbers in (("train", range(24)), ("validation", range(50, 54)), ("test", range(60, 64))):
        rows = [
            {"prompt": " ".join(WORDS[5 + number // power % 5] for power in (25, 5, 1)), "answer": "one"}
            for number in numbers
        ]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def pipeline(folder: Path, run: Path, *overrides: str) -> Run:
    source = {name: [{"type": "file", "path": f"{folder}/{name}.jsonl"}] for name in ("train", "validation", "test")}
    prompts = {"train": source["train"], "validation": {"mine": source["validation"]}}
    prompts |= {"test": {"mine": {"sources": source["test"]}}, "system_prompt": "be brief", "leakage": "allow"}
    four = {"num_generations": 4}
    settings = {
        "name": "chat",
        "run_dir": str(run),
        "policy": {"path": str(folder), "cpu_threads": 1},
        "prompts": prompts,
        "verifier": {"type": "function", "path": "tests.rewards.functions.even"},
        "collect": {**four, "validation_num_generations": 4, "max_completion_length": LENGTH},
        "select": {"strategy": {"type": "influence"}, "fraction": 0.25},
        "train": {"stages": 2, "steps_per_stage": 2},
        "trainer": {**four, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "beta": 0.0},
        "evaluate": {"every": 4},
    }
    path = run / "chat.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))
    return Run(load_config(str(path), overrides))


def trained(folder: Path, run: Path, *overrides: str) -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    made = pipeline(folder, run, *overrides)
    collect(made)
    last = train_all(made)
    made.folder.unlock()
    return selections(run / "chat"), load_file(last / "model.safetensors")


def test_completions_end_where_the_model_says_and_prompts_are_its_template_s(folder: Path, tmp_path: Path) -> None:
    made = pipeline(folder, tmp_path)
    collect(made)
    rows = made.trajectories.tables["train"].to_pylist()
    made.folder.unlock()
    words = dict(enumerate([*SPECIAL, *WORDS]))
    text = " ".join(words[token] for token in rows[0]["prompt_ids"])
    assert text.startswith("<|im_start|> system \n be brief <|im_end|> \n <|im_start|> user")
    assert text.endswith("<|im_end|> \n <|im_start|> assistant \n")
    ends = set()
    for row in rows:
        body, last = row["completion_ids"][:-1], row["completion_ids"][-1]
        assert not {0, 2} & set(body)
        assert len(row["prompt_ids"]) + len(row["completion_ids"]) <= CONTEXT
        assert (row["status"] == OK) == (last in (0, 2))
        if row["status"] == TRUNCATED:
            assert len(row["completion_ids"]) == LENGTH
        ends.add(last if last in (0, 2) else None)
        assert len(row["behaviour_logprobs"]) == len(row["completion_ids"])
    assert ends >= {0, 2}


def test_recomputed_activations_change_nothing(folder: Path, tmp_path: Path) -> None:
    """Gradient checkpointing in training, and scoring at the policies between: the same selections and weights."""
    plain, weights = trained(folder, tmp_path / "plain")
    saved, others = trained(folder, tmp_path / "recomputed", "trainer.gradient_checkpointing=true")
    assert plain
    assert list(plain.values()) == list(saved.values())
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name])


def test_asked_in_bfloat16_and_trained_in_float32(folder: Path, tmp_path: Path) -> None:
    """Oracle: scores of a stage within training are those of its checkpoint, loaded in bfloat16."""
    options = ["policy.dtype=bfloat16", "trainer.gradient_checkpointing=true", "trainer.save_total_limit=5"]
    _, weights = trained(folder, tmp_path, *options)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    made = pipeline(folder, tmp_path, *options)
    within = parquet.read_table(made.paths.scores(1) / "scores.parquet").to_pylist()
    shutil.rmtree(made.paths.scores(1))
    policy, origin = made.policy_at(1, None)
    assert policy.model.dtype == made.base.model.dtype == torch.bfloat16
    score(made, 1, policy.model, origin)
    made.folder.unlock()
    assert parquet.read_table(made.paths.scores(1) / "scores.parquet").to_pylist() == within
