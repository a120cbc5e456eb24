"""`cropi.run` from plain settings: a real run."""

from pathlib import Path

import pytest
import yaml

import cropi
from cropi.config.loading import recipe_text
from cropi.errors import ConfigError
from tests.runs import json_lines

TINY = (
    "prompts.train=[{type: builtin, families: [sum, parity], count: 8, seed: 1}]",
    "prompts.validation={sum: [{type: builtin, families: [sum], count: 4, seed: 2}]}",
    "prompts.test={sum: {sources: [{type: builtin, families: [sum], count: 4, seed: 3}]}}",
    "collect.validation_num_generations=4",
    "train.stages=2",
    "train.steps_per_stage=1",
    "trainer.per_device_train_batch_size=16",
    "evaluate.every=1",
)


def test_settings_become_a_run_and_the_same_call_resumes(tmp_path: Path) -> None:
    settings = yaml.safe_load(recipe_text("quickstart")) | {"name": "mine", "run_dir": str(tmp_path)}
    result = cropi.run(settings, *TINY)
    assert settings["train"] == {"stages": 3, "steps_per_stage": 16}  # as given
    assert result.summary.finished
    trained = {i for row in json_lines(tmp_path / "mine/rewards.jsonl") for i in row["prompt_ids"]}
    assert set(result.curriculum.prompt_id) == trained
    assert result.curriculum.completions.tolist() == [8] * 4
    assert set(result.selections.query("selected").prompt_id) == trained
    assert result.curriculum.why.notna().all()
    assert set(result.scores.columns) >= {"stage", "prompt", "influence/sum", "times_drawn"}
    before = (tmp_path / "mine/steps.jsonl").read_bytes()
    again = cropi.run(settings, *TINY)  # not refused as busy: the first call has let go of the folder
    assert (tmp_path / "mine/steps.jsonl").read_bytes() == before
    assert again.costs.equals(cropi.load(tmp_path / "mine").costs)


def test_a_fault_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"the settings: .*did you mean 'seed'"):
        cropi.run({"name": "mine", "sed": 1})
