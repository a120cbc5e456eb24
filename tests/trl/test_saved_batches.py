"""A script's checkpoints fall between generation batches, and what reading costs is written down."""

from pathlib import Path

import pytest

from cropi.console import warn_once
from tests.runs import json_lines
from tests.trl.scripts import trainer


def test_save_steps_are_rounded_up_and_every_step_says_what_it_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_once.cache_clear()
    trainer(tmp_path, steps_per_generation=4, max_steps=4, save_strategy="steps", save_steps=1).train()
    assert "every 2 steps instead of every 1" in capsys.readouterr().err
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    steps = json_lines(tmp_path / "_curriculum" / "run" / "steps.jsonl")
    assert [step["read_passes"] > 0 for step in steps] == [True] * 4
