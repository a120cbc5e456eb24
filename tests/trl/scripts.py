"""Small TRL scripts on the built-in policy, with a curriculum."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig

from cropi.builtin import POLICY_DIR, generate
from cropi.trl import CurriculumTrainer, Selector
from tests.runs import grpo_args

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def right(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(text.rpartition("answer ")[2].strip() == a) for text, a in zip(texts, answer, strict=True)]


def short(completions: Sequence[Any], **_: Any) -> list[float]:
    return [1 / (1 + len(str(text))) for text in completions]


async def right_later(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    return right(completions, answer)


def problems(*families: str, split: str = "train", count: int = 6, chat: bool = False) -> Dataset:
    rows = [row for family in families for row in generate(family, split=split, count=count, seed=0)]
    ask = [[{"role": "user", "content": row["prompt"]}] if chat else row["prompt"] for row in rows]
    return Dataset.from_list([{"prompt": p, "answer": row["answer"]} for p, row in zip(ask, rows, strict=True)])


def tokenizer(template: str = TEMPLATE) -> Any:
    made = AutoTokenizer.from_pretrained(POLICY_DIR)
    made.chat_template = template
    return made


def select(chat: bool = False, **changes: Any) -> Selector:
    return Selector(**{"validation": problems("sum", split="validation", count=6, chat=chat)} | changes)


def trainer(folder: Path, selector: Selector | None = None, **changes: Any) -> CurriculumTrainer:
    torch.set_num_threads(1)
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_generations": 4}
    settings |= {"max_completion_length": 8, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1}
    arguments = {name: changes.pop(name) for name in list(changes) if name in GRPOConfig.__dataclass_fields__}
    given: dict[str, Any] = {
        "model": str(POLICY_DIR),
        "reward_funcs": right,
        "args": grpo_args(folder, **(settings | arguments)),
        "train_dataset": problems("sum", "parity"),
        "selector": selector or select(),
    }
    return CurriculumTrainer(**(given | changes))
