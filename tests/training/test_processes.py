"""Training on several processes: the batch of one, shared, and what cannot be."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.runs import SMALL, judge

from cropi import parallel
from cropi.config.loading import load_config
from cropi.errors import ConfigError
from cropi.parallel import ProcessGroup
from cropi.streams import read_jsonl
from cropi.training.grpo_settings import grpo_config
from cropi.training.reward_log import RecordedReward


class Second(ProcessGroup):
    """The first of two processes, of which the second says what the first says."""

    size = 2

    def gather(self, value: Any) -> list[Any]:
        return [value, value]


def settings(processes: int, *overrides: str) -> Any:
    config = load_config("quickstart", [*SMALL, *overrides])
    return grpo_config(config, Path("runs"), torch.device("cpu"), processes)


@pytest.mark.parametrize(
    ("processes", "rows", "steps", "expected"),
    [
        (1, 32, 4, (32, 4)), (2, 32, 4, (32, 2)), (4, 32, 4, (32, 1)), (8, 32, 4, (16, 1)), (6, 33, 4, (11, 2)),
        (2, 32, 1, (16, 1)),
    ],
)  # fmt: skip
def test_processes_share_the_batch_of_one(processes, rows, steps, expected, monkeypatch):
    """Micro-steps first: what lies in memory at once stays as it was asked for."""
    monkeypatch.setattr("trl.GRPOConfig.world_size", processes)
    overrides = [f"trainer.per_device_train_batch_size={rows}", f"trainer.gradient_accumulation_steps={steps}"]
    found = settings(processes, *overrides, "trainer.num_generations=4", "collect.num_generations=4")
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == expected
    assert found.generation_batch_size == rows * steps


def test_generation_batches_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """steps_per_generation is in micro-steps, so it is divided with them, or not at all."""
    for steps, served, expected in ((4, 8, (32, 2, 4)), (4, 2, (32, 2, 1)), (4, 1, (16, 4, 1))):
        monkeypatch.setattr("trl.GRPOConfig.world_size", 2)
        overrides = [f"trainer.gradient_accumulation_steps={steps}", f"trainer.steps_per_generation={served}"]
        found = settings(2, *overrides, "train.steps_per_stage=4")
        shape = (found.per_device_train_batch_size, found.gradient_accumulation_steps, found.steps_per_generation)
        assert shape == expected
        assert found.generation_batch_size == 32 * served


@pytest.mark.parametrize(
    ("processes", "overrides", "message"),
    [
        (3, [], "a step has 32 x 1 completions, which 3 processes cannot share evenly"),
        (2, ["train.dynamic_sampling=2"], "dynamic sampling supports one process"),
    ],
)
def test_what_cannot_be_shared_is_refused(processes, overrides, message, monkeypatch):
    monkeypatch.setattr("trl.GRPOConfig.world_size", processes)
    with pytest.raises(ConfigError, match=message):
        settings(processes, *overrides)


def test_one_line_says_what_all_processes_were_rewarded_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_group", Second())
    verdicts = {"1": "correct", "2": "wrong"}
    reward = RecordedReward(judge(lambda text, _: verdicts[text]), tmp_path / "rewards.jsonl")
    state = SimpleNamespace(global_step=3)
    found = reward(["1", "2"], ["1", "1"], ["p", "q"], [[7], [7, 8]], trainer_state=state, prompt_tokens=[2, 3])
    assert found == [1.0, 0.0]
    assert read_jsonl(tmp_path / "rewards.jsonl") == [
        {
            "step": 3,
            "prompt_ids": ["p", "q", "p", "q"],
            "rewards": [1.0, 0.0, 1.0, 0.0],
            "verdicts": {"correct": 2, "wrong": 2},
            "tokens": 6,
            "prompt_tokens": 10,
        }
    ]
