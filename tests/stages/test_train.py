"""The stage loop against real TRL: which prompts, how many steps, and a resume that changes no bit."""

import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.runs import judge, refused_settings
from torch import nn

from cropi.builtin import POLICY_DIR
from cropi.config import Config, PolicyConfig
from cropi.config.loading import load_config
from cropi.console import warn_once
from cropi.errors import ArtifactError, ConfigError
from cropi.policy import Policy, load_policy
from cropi.policy import passes as policy_module
from cropi.stages.train import TrainTask, newest_checkpoint, train_stages
from cropi.streams import read_jsonl
from cropi.training.grpo_settings import _problem, grpo_config
from cropi.training.reward_log import RecordedReward

STAGES, STEPS = 2, 4
SELECTIONS = [["p0", "p1", "p2"], ["p7", "p8"]]
ROWS = [{"prompt_id": f"p{n}", "prompt": f"sum mod 7 : {n % 7} 3 5 =", "answer": "1"} for n in range(10)]


def config(*overrides: str) -> Config:
    settings = [
        f"train.stages={STAGES}",
        f"train.steps_per_stage={STEPS}",
        "evaluate.every=2",
        "collect.max_completion_length=6",
        "collect.num_generations=4",
        "trainer={num_generations: 4, per_device_train_batch_size: 8, learning_rate: 1e-3}",
        "trainer.save_strategy=steps",
        "trainer.save_steps=3",
        "trainer.save_total_limit=9",
    ]
    return load_config("quickstart", [*settings, *overrides])


class Recorder:
    """Stands for the pipeline: hands out selections and notes what the trainer asks."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, bool]] = []
        self.evaluated: list[int] = []

    def select(self, stage: int, model: nn.Module, in_progress: bool) -> Sequence[str]:
        self.asked.append((stage, in_progress))
        return SELECTIONS[stage]

    def evaluate(self, step: int, model: nn.Module) -> None:
        self.evaluated.append(step)


def policy() -> Policy:
    return load_policy(PolicyConfig(path="builtin", cpu_threads=1))


def verdict(completion: str, gold: str) -> str:
    """A rule that splits nearly every group: an even or odd number of words."""
    return "correct" if len(completion.split()) % 2 else "wrong"


def run(folder: Path, *overrides: str, recorder: Recorder | None = None) -> tuple[Recorder, dict[str, torch.Tensor]]:
    recorder, settings = recorder or Recorder(), config(*overrides)
    task = TrainTask(
        config=settings,
        rows=ROWS,
        settings=grpo_config(settings, folder / "checkpoints", torch.device("cpu")),
        reward=RecordedReward(judge(verdict), folder / "rewards.jsonl"),
        select_stage=recorder.select,
        evaluate=recorder.evaluate,
        folder=folder,
    )
    last = train_stages(task, policy())
    return recorder, load_file(last / "model.safetensors")


def seen(folder: Path) -> list[tuple[int, set[str]]]:
    rows = [json.loads(line) for line in (folder / "rewards.jsonl").read_text().splitlines()]
    return [(row["step"], set(row["prompt_ids"])) for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder, dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole") / "run"
    return (folder, *run(folder))


def test_each_stage_trains_its_selection_for_exactly_its_steps(whole):
    folder, recorder, _ = whole
    assert recorder.asked == [(0, False), (1, False)]
    assert recorder.evaluated == [2, 4, 6, 8]
    steps = seen(folder)
    assert [step for step, _ in steps] == list(range(8))
    for step, prompts in steps:
        assert prompts <= set(SELECTIONS[step // STEPS]), f"step {step} saw another stage's prompts"
    assert set().union(*(p for s, p in steps if s < STEPS)) == set(SELECTIONS[0])
    assert newest_checkpoint(folder / "checkpoints", STAGES * STEPS)[1] == 8


@pytest.mark.parametrize("step", [3, 6])
def test_resume_from_inside_a_stage_changes_no_bit(whole, step, tmp_path):
    folder, _, weights = whole
    shutil.copytree(folder, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    recorder, resumed = run(tmp_path / "run")
    assert recorder.asked == [(s, True) for s in range(step // STEPS + 1)] + [
        (s, False) for s in range(step // STEPS + 1, STAGES)
    ]
    assert seen(tmp_path / "run") == seen(folder)
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(weight, resumed[name]) for name, weight in weights.items())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_resume_inside_a_stage_with_two_updates_per_generation_changes_no_bit(accumulated: int, tmp_path: Path) -> None:
    """A generation batch of 8 or 16 completions serves two optimiser steps, and stages keep their length."""
    twice = ("trainer.num_iterations=2", "trainer.save_steps=2", f"trainer.gradient_accumulation_steps={accumulated}")
    whole, cut = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
    _, weights = run(whole, *twice)
    assert newest_checkpoint(whole / "checkpoints", STAGES * STEPS)[1] == STAGES * STEPS
    assert [step for step, _ in seen(whole)] == [0, 2, 4, 6]
    assert all(prompts <= set(SELECTIONS[step // STEPS]) for step, prompts in seen(whole))
    shutil.copytree(whole, cut)
    for step in (4, 6, 8):
        shutil.rmtree(cut / "checkpoints" / f"checkpoint-{step}")
    _, resumed = run(cut, *twice)
    assert seen(cut) == seen(whole)
    assert all(torch.equal(weight, resumed[name]) for name, weight in weights.items())


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_a_stage_is_saved_before_it_is_evaluated(strategy: str, tmp_path: Path) -> None:
    """An interrupted evaluation at the end of a stage costs no step of it, and is made up for."""

    class Interrupted(Recorder):
        def evaluate(self, step: int, model: nn.Module) -> None:
            if step == STEPS and not self.evaluated.count(0):
                self.evaluated.append(0)
                raise KeyboardInterrupt
            super().evaluate(step, model)

    options = [f"trainer.save_strategy={strategy}", f"trainer.save_steps={STEPS}"]
    recorder = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *options, recorder=recorder)
    _, weights = run(tmp_path, *options, recorder=recorder)
    assert recorder.evaluated == [2, 0, 4, 6, 8]
    assert recorder.asked == [(0, False), (0, True), (1, False)]
    assert [step for step, _ in seen(tmp_path)] == list(range(8))
    _, undisturbed = run(tmp_path / "undisturbed", *options)
    assert all(torch.equal(weights[name], undisturbed[name]) for name in weights)


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "swap"])
def test_training_does_not_go_on_from_a_damaged_checkpoint(whole, name, damage, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/checkpoint-8")
    path = tmp_path / "run/checkpoints/checkpoint-6" / name
    data = path.read_bytes()
    match damage:
        case "flip":
            path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
        case "cut":
            path.write_bytes(data[:-7])
        case "remove":
            path.unlink()
        case "swap":
            shutil.copy(tmp_path / "run/checkpoints/checkpoint-3" / name, path)
    if (name, damage) == ("manifest.json", "remove"):  # as an interruption leaves it
        assert newest_checkpoint(tmp_path / "run/checkpoints", 8) == (tmp_path / "run/checkpoints/checkpoint-3", 3)
        assert not path.parent.exists()
    elif path.read_bytes() != data if path.exists() else True:
        with pytest.raises(ArtifactError, match=f"checkpoint-6(/{name})?: "):
            run(tmp_path / "run")


def test_a_checkpoint_under_another_name_is_refused(whole, tmp_path):
    shutil.copytree(whole[0] / "checkpoints/checkpoint-3", tmp_path / "checkpoint-5")
    with pytest.raises(ArtifactError, match=r"checkpoint-5: is a checkpoint of step 3"):
        newest_checkpoint(tmp_path, 8)


def test_what_lies_beside_the_checkpoints_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("checkpoint-mybackup", "checkpoint-2-old", "checkpoint-20261129"):
        (folder / name).mkdir(parents=True)
        (folder / name / "mine").write_text("dear")
        os.utime(folder / name, (0, 0))  # transformers takes the oldest for the first
    (tmp_path / "elsewhere").mkdir()
    (folder / "checkpoint-7").symlink_to(tmp_path / "elsewhere")
    run(tmp_path, "trainer.save_total_limit=2")
    assert {path.name for path in folder.iterdir()} == {
        *("checkpoint-mybackup", "checkpoint-2-old", "checkpoint-20261129", "checkpoint-7"),
        *("checkpoint-6", "checkpoint-8"),
    }
    assert all((folder / name / "mine").is_file() for name in ("checkpoint-mybackup", "checkpoint-20261129"))


def test_a_checkpoint_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-3").symlink_to(tmp_path / "theirs")
    with pytest.raises(ArtifactError, match="checkpoint-3: is in the way of a checkpoint"):
        run(tmp_path)
    assert not list((tmp_path / "theirs").iterdir())


def test_a_disk_that_fills_up_while_torch_writes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says nothing of the disk: `unexpected pos`."""
    save = torch.save

    def full(value: object, path: str) -> None:
        save(value, "/dev/full" if Path(path).name == "optimizer.pt" else path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ArtifactError, match=r"checkpoint-3: no space left on the disk"):
        run(tmp_path)
    monkeypatch.setattr(torch, "save", save)
    run(tmp_path)
    assert newest_checkpoint(tmp_path / "checkpoints", 8)[1] == 8


def test_stages_see_the_policy_without_mixed_precision(tmp_path: Path) -> None:
    kinds = []

    class Looker(Recorder):
        def evaluate(self, step: int, model: nn.Module) -> None:
            with torch.no_grad():
                kinds.append(model.model.layers[0].mlp.up_proj(torch.zeros(1, 128)).dtype)
                model.model.register_forward_hook(lambda *_: kinds.append(torch.is_autocast_enabled("cpu")))
                model(input_ids=torch.tensor([[3, 4]]))

    run(tmp_path, "trainer.bf16=true", recorder=Looker())
    assert kinds
    assert torch.float32 in kinds
    assert kinds[1] is False


def test_completions_of_a_prompt_share_its_forward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards and weights are those of training that passes every prompt once for each of its completions."""
    shared = []
    plain = policy_module.shared_prefixes

    def counting(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        shared.append(plain(model, ids, mask))
        return shared[-1]

    monkeypatch.setattr("cropi.training.stage_trainer.shared_prefixes", counting)
    _, weights = run(tmp_path / "shared")
    assert shared
    assert all(shared)
    monkeypatch.setattr("cropi.training.stage_trainer.shared_prefixes", lambda *_: {})
    _, others = run(tmp_path / "apart")
    assert seen(tmp_path / "shared") == seen(tmp_path / "apart")
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name])


@pytest.mark.parametrize(
    ("settings", "asked", "saved"),
    [
        (("num_iterations=2",), "3", 4),  # a generation batch serves two steps
        (("num_iterations=2", "gradient_accumulation_steps=4"), "3", 4),
        (("num_iterations=3", "gradient_accumulation_steps=2"), "1", 3),
        (("steps_per_generation=1", "gradient_accumulation_steps=4"), "3", 3),  # a step takes several of them
        (("num_iterations=2",), "0.4", 6),  # of twelve steps
        (("num_iterations=2",), "4", 4),
    ],
)
def test_checkpoints_fall_between_generation_batches(settings, asked, saved, tmp_path, capsys):
    warn_once.cache_clear()
    given = [f"trainer.{text}" for text in settings]
    given += [f"trainer.save_steps={asked}", "train.stages=2", "train.steps_per_stage=6"]
    config = load_config("quickstart", ["trainer.save_strategy=steps", *given])
    assert grpo_config(config, tmp_path, torch.device("cpu")).save_steps == saved
    said = capsys.readouterr().err
    assert said == "" if asked == str(saved) else f"every {saved} steps instead of every" in said


@pytest.mark.usefixtures("trial_step")
@pytest.mark.parametrize(("override", "message"), refused_settings("trainer"))
def test_trainer_settings_that_cannot_work_are_refused(override, message, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # accelerate takes settings of FSDP from there
    with pytest.raises(ConfigError, match=message):
        grpo_config(config(override), tmp_path, torch.device("cpu"))


@pytest.mark.usefixtures("trial_step")
@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("trainer.mask_truncated_completions=False", False), ("trainer.bf16=False", False),
        ("trainer.fp16=no", False), ("trainer.log_completions=True", True), ("trainer.log_completions='1'", True),
        ("trainer.disable_dropout=on", True), ("trainer.learning_rate='5e-5'", 5e-5),
        ("trainer.learning_rate=1", 1.0), ("trainer.num_iterations='1'", 1), ("trainer.save_total_limit=1_000", 1000),
        ("trainer.beta='0'", 0.0), ("trainer.scale_rewards=False", "none"), ("trainer.scale_rewards=true", "group"),
        ("trainer.scale_rewards=batch", "batch"), ("trainer.report_to=null", []), ("trainer.report_to=none", []),
        ("trainer.lr_scheduler_kwargs={}", {}), ("trainer.run_name='7'", "7"),
    ],
)  # fmt: skip
def test_trainer_settings_have_the_types_of_trl(override: str, value: object, tmp_path: Path) -> None:
    settings = grpo_config(config(override), tmp_path, torch.device("cpu"))
    found = getattr(settings, override.partition("=")[0].removeprefix("trainer."))
    assert (found, type(found)) == (value, type(value))


def test_settings_that_do_not_fit_the_policy_are_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM is not a Mixture-of-Experts"):
        run(tmp_path, "trainer.router_aux_loss_coef=0.1")


@pytest.mark.usefixtures("trial_step")
def test_a_trial_step_leaves_random_states_as_they_were(tmp_path: Path) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    _problem.cache_clear()
    grpo_config(config(), tmp_path, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_rewards_are_recorded_and_forgotten_by_step(tmp_path: Path) -> None:
    same = judge(lambda completion, gold: "correct" if completion == gold else "wrong")
    reward = RecordedReward(same, tmp_path / "r.jsonl")
    for step, completions in ((0, ["1", "2"]), (1, ["1", "1"]), (2, ["2", "2"])):
        state = type("State", (), {"global_step": step})()
        reward(completions, ["1", "1"], ["p", "p"], [[1], [1]], trainer_state=state)
    assert [row["rewards"] for row in read_jsonl(tmp_path / "r.jsonl")] == [[1, 0], [1, 1], [0, 0]]
    reward.forget_from(1)
    assert [row["rewards"] for row in read_jsonl(tmp_path / "r.jsonl")] == [[1, 0]]


def test_the_kl_reference_runs_no_code_of_a_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(POLICY_DIR, folder)
    settings = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    (folder / "config.json").write_text(json.dumps(settings | {"auto_map": auto_map}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": auto_map}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr(f"{__name__}.policy", lambda: load_policy(PolicyConfig(path=str(folder), cpu_threads=1)))
    run(tmp_path / "run", "trainer.beta=0.1")
    assert not (tmp_path / "ran").exists()
