"""The scripts of the SmolLM2 example: where they are found, and a policy and pools that take them seconds."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_llama
from transformers import AutoTokenizer

from cropi.builtin import POLICY_DIR, generate

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "smollm2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy with tied embeddings, and a chat template that adds nothing."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY_DIR)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 2048}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.02}
    model = tiny_llama(dtype=torch.float32, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    folder = tmp_path_factory.mktemp("policy")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pools of three kinds, whose targeted one is 'two-step'."""
    folder = tmp_path_factory.mktemp("data")
    kinds = {"sum": "two-step", "parity": "letters", "machine": "divisors"}
    pools = {"niche/train": ("train", 12, [*kinds]), "validation": ("validation", 6, ["sum"])}
    pools |= {"test-targeted": ("test", 3, ["sum"]), "test-untargeted": ("test", 3, ["parity", "machine"])}
    for name, (split, count, families) in pools.items():
        lines = [
            json.dumps({"question": row["prompt"], "answer": row["answer"], "source": kinds[family]}) + "\n"
            for family in families
            for row in generate(family, split=split, count=count, seed=0)
        ]
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def easy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards that a random policy gets."""
    monkeypatch.setattr("grpo.is_correct", lambda text, answer: len(text) % 2 == 0)
