"""Runs of choosers that learn from rewards alone: what they are charged for, and that they resume bit for bit."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.runs import json_lines
from tests.stages.test_online_trainer import SETTINGS, run, same, weights

from cropi import load
from cropi.config.loading import load_config
from cropi.curriculum.chooser import Choice
from cropi.curriculum.strategies.lze import Lze
from cropi.gradients.training_influence import Reader
from cropi.report.costs import flops
from cropi.stages.online_loop import ChooserLoop, load_state
from cropi.stages.online_trainer import ReadsInfluence
from cropi.stages.validation_pass import ValidationPass
from cropi.training.group_evidence import LossNormalizer


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("rewards alone were to be read")


@pytest.fixture(scope="module")
def mopps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for reads in (Reader, ValidationPass, LossNormalizer):
            patch.setattr(reads, "__init__", refuse)
        patch.setattr("cropi.stages.online.make_representations", refuse)
        return run(tmp_path_factory.mktemp("mopps"), "{type: mopps, candidates: 2}")


def test_of_rewards_nothing_is_charged_but_training_and_evaluation(mopps: Path) -> None:
    lines = json_lines(mopps / "ledger.jsonl")
    assert {line["phase"] for line in lines if line["phase"] not in {"select", "evaluate"}} <= {"collect"}
    assert not any(line.get("tokens") or line.get("prompt_tokens") for line in lines if line["phase"] == "collect")
    assert not (mopps / "representations").exists()
    assert not list((mopps / "trajectories").glob("part-*"))


def test_a_gate_trains_on_some_groups_and_learns_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, learned = list[int](), list[int]()
    compute, learn = ReadsInfluence.compute_loss, Lze.learn

    def computed(self: ReadsInfluence, model: object, inputs: dict[str, torch.Tensor], *rest: Any, **named: Any) -> Any:
        rows.append(len(inputs["completion_ids"]))
        return compute(self, model, inputs, *rest, **named)  # type: ignore[arg-type]

    def learnt(self: Lze, place: int, rewards: np.ndarray, step: int) -> None:
        learned.append(place)
        learn(self, place, rewards, step)

    monkeypatch.setattr(ReadsInfluence, "compute_loss", computed)
    monkeypatch.setattr(Lze, "learn", learnt)
    folder = run(tmp_path, "lze")
    assert rows == [4] * 12  # of four groups one, in two micro-steps
    assert len(learned) == 24
    config = load_config("quickstart", [*SETTINGS, "select.strategy=lze", "trainer.beta=0.0"])
    batches = json_lines(folder / "rewards.jsonl")
    tokens = sum(row["tokens"] + row["prompt_tokens"] for row in batches)
    assert flops(config, 1, [], [], batches).train == 2 * tokens * (1 + 3 / 4)


def test_a_pool_smaller_than_a_batch_is_repeated(tmp_path: Path) -> None:
    three = "prompts.train=[{type: builtin, families: [sum], count: 3, seed: 1}]"
    folder = run(tmp_path, "mopps", three, "train.stages=1", "train.steps_per_stage=1")  # reports at its end
    groups = load(folder).curriculum
    assert len(groups) == 3
    assert groups["why"].notna().all()
    (choice,) = json_lines(folder / "choices.jsonl")
    assert len(choice["prompt_ids"]) == len(choice["why"]) == 4


@pytest.fixture(scope="module")
def refilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("refilled"), "thompson-dapo")


def test_refills_are_chosen_and_dropped_groups_are_learned_of(refilled: Path) -> None:
    choices, sampled = (json_lines(refilled / name) for name in ("choices.jsonl", "rewards.jsonl"))
    assert len(choices) > 6  # some batches were refilled
    assert [list(dict.fromkeys(row["prompt_ids"])) for row in sampled] == [row["prompt_ids"] for row in choices]
    assert [row["asked_at"] for row in choices] == [row["step"] for row in sampled]
    state = load_state(refilled / "checkpoints" / "checkpoint-6")["curriculum"]
    groups = json.loads(state["facts"].tobytes().decode())["seen"]
    assert len(groups) == sum(len(row["prompt_ids"]) for row in choices)  # every group that was sampled
    in_step = Counter((row["step"], prompt_id) for row in choices for prompt_id in row["prompt_ids"])
    assert set(in_step.values()) == {1}


def test_a_refilled_run_resumes_bit_for_bit(refilled: Path, tmp_path: Path) -> None:
    shutil.copytree(refilled.parents[1], tmp_path / "again")
    folder = tmp_path / "again" / "runs" / "run"
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    run(tmp_path / "again", "thompson-dapo")
    assert same(weights(folder), weights(refilled))
    states = [each / "checkpoints" / "checkpoint-6" / "curriculum.json" for each in (folder, refilled)]
    assert states[0].read_text() == states[1].read_text()


@pytest.mark.parametrize(
    "strategy", [pytest.param("{type: similarity_learnability, by: hidden}", marks=pytest.mark.slow), "bmc-t"]
)
def test_hidden_states_are_charged(strategy: str, tmp_path: Path) -> None:
    folder = run(tmp_path, strategy)
    lines = json_lines(folder / "ledger.jsonl")
    (read,) = [line for line in lines if line["phase"] == "score"]
    assert read["forward_tokens"] > 0
    assert not any(line.get("tokens") for line in lines if line["phase"] == "collect")
    assert len(json_lines(folder / "choices.jsonl")) == 6


def test_a_batch_that_is_sampled_again_after_a_checkpoint_keeps_its_reasons() -> None:
    """The checkpoint counted it as observed already, and the ones after it too early by one."""
    explained = [[Choice(n, "mean", "one")] for n in range(4)]
    loop = SimpleNamespace(explained=explained, draws=False, _observed=2, place_of={str(n): n for n in range(9)})
    for n in (1, 2, 3):
        assert ChooserLoop._choices(loop)(str(n)).source == "mean"  # type: ignore[arg-type]
    assert ChooserLoop._choices(loop)("7").source == "uniform"  # type: ignore[arg-type]
