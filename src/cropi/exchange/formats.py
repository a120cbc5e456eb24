"""Rows of prompts in the format of each trainer. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cropi.errors import DataError

Prompt = str | list[dict[str, Any]]  # text, or chat messages


@dataclass(frozen=True)
class Item:
    """A prompt and its place in the file."""

    prompt_id: str
    prompt: Prompt
    answer: str
    source: str
    facts: str  # further input of verifiers: see `cropi.exchange.rewards.facts_of`
    split: str
    place: int


@dataclass(frozen=True)
class Format:
    """The files and rows of a trainer, and its reward function."""

    suffix: Literal["parquet", "jsonl"]
    row: Callable[[Item], dict[str, Any]]
    reward: str  # the line of reward.py that names a method of `Rewards`
    chat_only: bool = False  # it applies the chat template to every prompt
    files: Mapping[str, str] = field(default_factory=dict)  # what else it needs: texts by file name


def _trl(item: Item) -> dict[str, Any]:
    names = ("prompt", "answer", "source", "prompt_id", "facts")
    return {name: getattr(item, name) for name in names}


def _verl(item: Item) -> dict[str, Any]:
    known = {"split": item.split, "index": item.place, "prompt_id": item.prompt_id, "facts": item.facts}
    return {
        "data_source": item.source,
        "prompt": item.prompt,
        "ability": item.source,
        "reward_model": {"style": "rule", "ground_truth": item.answer},
        "extra_info": known,
    }


def _slime(item: Item) -> dict[str, Any]:
    known = {"prompt_id": item.prompt_id, "source": item.source, "facts": item.facts}
    return {"prompt": item.prompt, "label": item.answer, "metadata": known}


def _openrlhf(item: Item) -> dict[str, Any]:
    label = json.dumps({"answer": item.answer, "facts": item.facts})  # the only input of its reward functions
    return {"prompt": item.prompt, "label": label, "datasource": item.source, "prompt_id": item.prompt_id}


def _prime_rl(item: Item) -> dict[str, Any]:
    known = {"answer": item.answer, "source": item.source, "facts": item.facts}
    return {"id": item.prompt_id, "prompt": item.prompt, **known}


TASKSET = '''\
"""The stage as a taskset of verifiers': its reward is the run's verifier."""

import json
from collections.abc import Iterator
from pathlib import Path

import verifiers.v1 as vf
from reward import rewards

__all__ = ["StageTaskset"]


class StageData(vf.TaskData):
    answer: str
    source: str
    facts: str


class StageTask(vf.Task[StageData]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return await rewards.task(trace.last_reply, self.data.answer, self.data.facts)


class StageConfig(vf.TasksetConfig):
    path: str


class StageTaskset(vf.Taskset[StageTask, StageConfig]):
    def load(self) -> Iterator[StageTask]:
        with Path(self.config.path).open(encoding="utf-8") as file:
            for line in file:
                yield StageTask(StageData(**json.loads(line)), self.config.task)
'''

FORMATS = {
    "trl": Format("parquet", _trl, "reward = rewards.trl"),
    "verl": Format("parquet", _verl, "compute_score = rewards.verl", chat_only=True),
    "slime": Format("jsonl", _slime, "custom_rm = rewards.slime"),
    "openrlhf": Format("jsonl", _openrlhf, "reward_func = rewards.openrlhf"),
    "prime-rl": Format("jsonl", _prime_rl, "", chat_only=True, files={"cropi_stage.py": TASKSET}),
}
"""By the name that `cropi export --format` takes."""


def named(name: str) -> Format:
    """The format of a name. DataError if it is unknown."""
    if name not in FORMATS:
        raise DataError(f"there is no format {name!r}", where="--format", fix=f"give one of {', '.join(FORMATS)}.")
    return FORMATS[name]
