"""An online run against real TRL: it learns of every group, resumes bit for bit, and observing changes nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.runs import SMALL, cropi, cropi_error, cropi_ok, json_lines
from trl import GRPOConfig

from cropi.config import PolicyConfig
from cropi.config.loading import load_config
from cropi.curriculum.curriculum import Curriculum
from cropi.errors import ConfigError
from cropi.policy import load_policy
from cropi.run_estimate import _validation_completions
from cropi.stages.online_loop import load_state
from cropi.stages.validation_pass import RANK
from cropi.training.grpo_settings import grpo_config

SETTINGS = [
    *(text for text in SMALL if not text.startswith(("select.", "trainer.per_device", "evaluate."))),
    "evaluate.every=6",
    "trainer.per_device_train_batch_size=16",
    "trainer.gradient_accumulation_steps=2",
    "trainer.save_total_limit=9",
    "name=run",
]
Weights = dict[str, torch.Tensor]


def run(place: Path, strategy: str, *overrides: str) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    cropi_ok("run", "quickstart", *SETTINGS, f"select.strategy={strategy}", *overrides, cwd=place)
    return place / "runs" / "run"


def weights(folder: Path, step: int = 6) -> Weights:
    return load_file(folder / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")


def same(first: Weights, second: Weights) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def beliefs(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("beliefs/stage-*/*")}


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("cropi"), "{type: cropi}")


def test_nothing_of_the_pool_is_collected_and_every_choice_is_written(online: Path) -> None:
    assert not list((online / "trajectories").glob("part-*"))
    choices = json_lines(online / "choices.jsonl")
    trained = [row["prompt_ids"] for row in json_lines(online / "rewards.jsonl")]
    assert [list(dict.fromkeys(ids)) for ids in trained] == [row["prompt_ids"] for row in choices]


def test_validation_completions_directions_representations_and_choices_are_charged(online: Path) -> None:
    lines = json_lines(online / "ledger.jsonl")
    assert any(line["phase"] == "collect" and line["step"] == 0 and line["tokens"] > 0 for line in lines)
    assert any(line["phase"] == "score" and line.get("validation_tokens", 0) > 0 for line in lines)
    assert any(line["phase"] == "score" and line.get("forward_tokens", 0) > 0 for line in lines)
    assert sum(line["phase"] == "select" and line["stage"] is not None for line in lines) >= 6
    assert not any(line["phase"] == "collect" and line["stage"] is None for line in lines)
    batches, steps = (json_lines(online / name) for name in ("rewards.jsonl", "steps.jsonl"))
    policy = load_policy(PolicyConfig(path="builtin")).model
    shapes = [m.weight.shape for m in policy.modules() if isinstance(m, torch.nn.Linear)]
    for number, (batch, step) in enumerate(zip(batches, steps, strict=True)):
        sides = sum(map(sum, shapes if number == 0 else shapes[:-1]))  # then it is known that TRL's head is not read
        tokens, both = batch["tokens"] + batch["prompt_tokens"], 2 * RANK  # halves of a direction
        expected = both * tokens * sides / sum(n_out * n_in for n_out, n_in in shapes)
        assert step["read_passes"] == pytest.approx(expected)


def test_check_estimates_what_the_run_then_spends(online: Path, tmp_path: Path) -> None:
    done = cropi("check", "quickstart", *SETTINGS, "select.strategy={type: cropi}", "--json", cwd=tmp_path)
    estimates = json.loads(done.stdout)["estimates"]
    (represented,) = [line for line in json_lines(online / "ledger.jsonl") if "forward_tokens" in line]
    assert estimates["representation_tokens"] == represented["forward_tokens"]
    spent = load_state(online / "checkpoints" / "checkpoint-6")["curriculum"]
    rounds = json.loads(spent["facts"].tobytes().decode())["rounds"]
    assert estimates["validation_completions"] == len(rounds) * 2 * 32  # two generation batches of 32
    assert "trajectories" not in estimates


@pytest.mark.parametrize(("steps", "rounds"), [(1, 1), (8, 1), (9, 2), (24, 2), (25, 3), (41, 4)])
def test_check_knows_the_rounds_of_the_curriculum(steps: int, rounds: int) -> None:
    curriculum, taken = Curriculum(np.eye(4), {"one": np.eye(4)}, seed=0, batch=2), 0
    for step in range(steps):
        if counts := curriculum.validation_due(step).get("one"):
            taken += sum(counts)
            curriculum.observe_validation("one", 0, [0.0, 1.0], step=step)
    for steps_per_generation in (1, 4):  # a generation batch of 16 completions, or of 64 for four steps
        settings = GRPOConfig(
            per_device_train_batch_size=16, num_generations=8, steps_per_generation=steps_per_generation, use_cpu=True,
            bf16=False,
        )  # fmt: skip
        assert taken == _validation_completions(steps, settings) == rounds * 32


def test_the_loader_asks_one_batch_ahead_within_a_stage(online: Path) -> None:
    asked = [row["asked_at"] for row in json_lines(online / "choices.jsonl")]
    assert asked == [0, 0, 1, 3, 3, 4]


def test_a_resumed_run_equals_an_uninterrupted_one(online: Path, tmp_path: Path) -> None:
    shutil.copytree(online.parents[1], tmp_path / "again")
    folder = tmp_path / "again" / "runs" / "run"
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    run(tmp_path / "again", "{type: cropi}")
    assert same(weights(folder), weights(online))
    choices = [[row["prompt_ids"] for row in json_lines(place / "choices.jsonl")] for place in (folder, online)]
    assert choices[0] == choices[1]
    assert beliefs(folder) == beliefs(online)
    assert len(beliefs(online)) == 4  # two stages, each with a manifest
    states = [place / "checkpoints" / "checkpoint-6" / "curriculum.json" for place in (folder, online)]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_observing_leaves_the_weights_of_plain_training(tmp_path: Path) -> None:
    observed = run(tmp_path / "observed", "{type: cropi, observe_only: true}")
    plain = run(tmp_path / "plain", "{type: full}")
    assert same(weights(observed), weights(plain))


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{}")])
def test_training_does_not_resume_without_the_curriculum_s_state(online, tmp_path, damage):
    shutil.copytree(online.parents[1], tmp_path / "again")
    folder = tmp_path / "again" / "runs" / "run" / "checkpoints"
    shutil.rmtree(folder / "checkpoint-6")
    damage(folder / "checkpoint-3" / "curriculum.json")
    done = cropi_error("run", "quickstart", *SETTINGS, "select.strategy={type: cropi}", cwd=tmp_path / "again")
    assert "curriculum" in done.stderr


def test_where_too_little_is_read_prompts_are_chosen_by_rewards(tmp_path, monkeypatch):
    monkeypatch.setattr("cropi.stages.online_loop.ENOUGH_READ", 1.1)
    done = cropi_ok("run", "quickstart", *SETTINGS, "select.strategy={type: cropi}", cwd=tmp_path)
    assert "of the squared gradient can be read" in done.stderr
    why = [row["why"] for row in json_lines(tmp_path / "runs" / "run" / "choices.jsonl")]
    assert {source.split()[0] for sources in why[2:] for source in sources} <= {"likeness", "uniform", "learnability"}
    assert any(source.startswith("likeness") for sources in why[2:] for source in sources)


def test_dynamic_sampling_is_refused(tmp_path: Path) -> None:
    settings = [*SETTINGS, "select.strategy={type: cropi}", "train.dynamic_sampling=2"]
    done = cropi_error("run", "quickstart", *settings, cwd=tmp_path)
    assert "train.dynamic_sampling" in done.stderr


def test_batches_that_one_process_fetches_for_all_are_refused(tmp_path: Path) -> None:
    settings = [*SETTINGS, "select.strategy={type: cropi}", "trainer.accelerator_config={dispatch_batches: true}"]
    with pytest.raises(ConfigError, match="one of them would fetch it for all"):
        grpo_config(load_config("quickstart", settings), tmp_path, torch.device("cpu"), processes=2)


@pytest.mark.parametrize(
    "settings",
    [
        ["trainer.gradient_checkpointing=true", "trainer.gradient_checkpointing_kwargs={use_reentrant: false}"],
        ["trainer.steps_per_generation=1", "trainer.num_iterations=2"],  # two generation batches in an optimiser step
        ["trainer.steps_per_generation=4"],  # a generation batch over two optimiser steps
    ],
)
def test_it_reads_under_other_settings(settings: list[str], tmp_path: Path) -> None:
    folder = run(tmp_path, "{type: cropi}", "train.stages=1", "train.steps_per_stage=4", *settings)
    last = [row for row in json_lines(folder / "metrics.jsonl") if "curriculum/share_read" in row][-1]
    assert last["curriculum/share_read"] > 0.5
    assert last["curriculum/rows_dropped"] == 0
    state = load_state(folder / "checkpoints" / "checkpoint-4")["curriculum"]
    pool = len(state["last"])
    assert (state["influence/sum/seen"][:, 0] < pool).sum() > 4  # prompts of the pool
