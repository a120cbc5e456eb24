"""Dynamic sampling against real TRL: what is trained on, what is charged, and a resume that changes no bit."""

import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.runs import judge
from tests.stages.test_train import policy
from torch import Tensor

from cropi.config.loading import load_config
from cropi.errors import ConfigError
from cropi.stages.train import StageCallback, TrainTask, train_stages
from cropi.streams import read_jsonl
from cropi.training.dynamic_sampling import DynamicSampling
from cropi.training.grpo_settings import grpo_config
from cropi.training.reward_log import Judged, RecordedReward
from cropi.training.stage_trainer import StageTrainer

K, TEMPERATURE, LENGTH = 4, 1.5, 6
POOL = [f"p{n}" for n in range(24)]
ROWS = [
    {"prompt_id": prompt_id, "prompt": f"sum mod 7 : {n % 7} {n // 7} 5 =", "answer": ("any", "solved", "dead")[n % 3]}
    for n, prompt_id in enumerate(POOL)
]
SETTINGS = [
    "select.strategy=full",
    f"collect.max_completion_length={LENGTH}",
    f"collect.temperature={TEMPERATURE}",
    "trainer={num_generations: 4, per_device_train_batch_size: 8, learning_rate: 1e-3, max_grad_norm: 0}",
    "trainer.save_strategy=steps",
    "trainer.save_total_limit=9",
    "trainer.save_steps=1",
]


def verdict(text: str, gold: str) -> str:
    """A third of the prompts is always solved, a third never; of the rest, a completion in two by its text."""
    return "correct" if gold == "solved" or (gold == "any" and even(text)) else "wrong"


def even(text: str) -> bool:
    return sum(map(ord, text)) % 2 == 0


def run(
    folder: Path,
    refills: int,
    *overrides: str,
    selections: Sequence[Sequence[str]] = (POOL,),
    steps: int = 1,
    verify: Callable[[str, str], str] = verdict,
) -> dict[str, Tensor]:
    stages = [f"train.stages={len(selections)}", f"train.steps_per_stage={steps}", f"evaluate.every={steps}"]
    settings = load_config("quickstart", [*SETTINGS, *stages, *overrides, f"train.dynamic_sampling={refills}"])
    task = TrainTask(
        config=settings,
        rows=ROWS,
        settings=grpo_config(settings, folder / "checkpoints", torch.device("cpu")),
        reward=RecordedReward(judge(verify), folder / "rewards.jsonl"),
        select_stage=lambda stage, *_: selections[stage],
        evaluate=lambda *_: None,
        folder=folder,
    )
    return load_file(train_stages(task, policy()) / "model.safetensors")


class Spy:
    """By optimiser step: rows of the loss (prompt tokens, completion tokens, advantage); all sampled tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: dict[int, list[tuple[Any, Any, float]]] = defaultdict(list)
        self.sampled: dict[int, int] = defaultdict(int)
        compute, generate = StageTrainer._compute_loss, StageTrainer._generate_single_turn

        def compute_loss(trainer: StageTrainer, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            for row, advantage in enumerate(inputs["advantages"].tolist()):
                tokens = (
                    tuple(inputs[f"{part}_ids"][row][inputs[f"{part}_mask"][row].bool()].tolist())
                    for part in ("prompt", "completion")
                )
                self.trained[trainer.state.global_step].append((*tokens, advantage))
            return compute(trainer, model, inputs)

        def single_turn(trainer: StageTrainer, *args: Any, **kwargs: Any) -> Any:
            completions, logprobs = generate(trainer, *args, **kwargs)
            self.sampled[trainer.state.global_step] += sum(map(len, completions))
            return completions, logprobs

        monkeypatch.setattr(StageTrainer, "_compute_loss", compute_loss)
        monkeypatch.setattr(StageTrainer, "_generate_single_turn", single_turn)

    def groups(self, step: int) -> dict[Any, list[tuple[Any, float]]]:
        """Completions and advantages by prompt; each prompt stands in a step once."""
        found: dict[Any, list[tuple[Any, float]]] = defaultdict(list)
        for prompt, completion, advantage in self.trained[step]:
            found[prompt].append((completion, advantage))
        assert all(len(rows) == K for rows in found.values())
        return found


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of the steps, without what the clock decides."""
    clock = ("time", "runtime", "per_second")
    rows = [{k: v for k, v in r.items() if not k.endswith(clock)} for r in read_jsonl(folder / "metrics.jsonl")]
    return [row for row in rows if "loss" in row]


def drawn(folder: Path) -> list[tuple[int, list[str]]]:
    """Step and prompts of everything that was sampled, in order."""
    return [(row["step"], row["prompt_ids"][::K]) for row in read_jsonl(folder / "rewards.jsonl")]


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
def test_a_refilled_step_is_the_plain_step_on_the_groups_it_ends_with(loss, tmp_path, monkeypatch):
    """Gradient of the step against autograd over the surrogate written out, one completion at a time."""
    gradients: dict[str, Tensor] = {}

    def keep(*_: Any, model: torch.nn.Module, **__: Any) -> None:
        gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    monkeypatch.setattr(StageCallback, "on_pre_optimizer_step", keep, raising=False)
    spy = Spy(monkeypatch)
    overrides = (f"trainer.loss_type={loss}", "trainer.gradient_accumulation_steps=2", "trainer.beta=0.1")
    run(tmp_path, 8, *overrides)
    assert len(drawn(tmp_path)) > 1, "nothing was refilled"

    base = policy()
    groups = spy.groups(0)
    tokens = sum(len(completion) for rows in groups.values() for completion, _ in rows)
    total = torch.zeros(())
    for prompt, rows in groups.items():
        texts = base.tokenizer.batch_decode([completion for completion, _ in rows], skip_special_tokens=True)
        rewards = torch.tensor([float(even(text)) for text in texts])
        assert 0 < rewards.sum() < K
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for (completion, _), advantage in zip(rows, advantages, strict=True):
            logits = base.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
            logprob = logits.log_softmax(-1)[range(len(completion)), list(completion)].sum()
            weight = {"grpo": 1 / (16 * len(completion)), "dr_grpo": 1 / (16 * LENGTH), "dapo": 1 / tokens}[loss]
            total = total - advantage * logprob * weight  # at the first update the ratio is 1 and the KL term flat
    total.backward()
    assert gradients
    for name, parameter in base.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=2e-3, atol=2e-6)


# Stages 0 and 1 share a selection, so the walk goes on; stage 2 begins another.
SELECTIONS = (POOL, POOL, POOL[:12])
STEPS = 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Spy, dict[str, Tensor]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        spy = Spy(monkeypatch)
        return folder, spy, run(folder, 9, selections=SELECTIONS, steps=STEPS)


def test_every_trained_group_is_mixed_and_everything_sampled_is_charged(whole):
    folder, spy, _ = whole
    by_step: dict[int, list[list[str]]] = defaultdict(list)
    for step, prompts in drawn(folder):
        by_step[step].append(prompts)
    assert list(by_step) == list(range(6))
    charged = dict.fromkeys(by_step, 0)
    for row in read_jsonl(folder / "rewards.jsonl"):
        charged[row["step"]] += row["tokens"]
    assert charged == spy.sampled
    for step, line in enumerate(metrics(folder)):
        advantages = [[a for _, a in rows] for rows in spy.groups(step).values()]
        assert len(advantages) == 2
        assert all(min(group) < 0 < max(group) for group in advantages)
        first, *extra = by_step[step]
        assert len(first) == 2
        assert line["dynamic_sampling/extra"] == len(extra)
        assert line["dynamic_sampling/equal_after"] == 0
        tokens = sum(len(completion) for _, completion, _ in spy.trained[step])
        assert line["dynamic_sampling/trained_tokens"] == tokens
        assert line["dynamic_sampling/equal_before"] == (len(extra[0]) / 2 if extra else 0)
        assert all(len(later) <= len(earlier) for earlier, later in pairwise(extra))
    assert sum(map(len, by_step.values())) > 6


def test_refills_go_on_in_the_walk_through_the_selection(whole: tuple[Path, Spy, dict[str, Tensor]]) -> None:
    order = [prompt for step, prompts in drawn(whole[0]) if step < 4 for prompt in prompts]
    assert len(order) > len(set(order[: len(POOL)])) == len(POOL)
    last = [prompt for step, prompts in drawn(whole[0]) if step >= 4 for prompt in prompts]
    assert set(last) <= set(SELECTIONS[2])
    assert len(set(last[:12])) == min(12, len(last))


@pytest.mark.parametrize("step", [3, 4])
def test_a_resumed_run_changes_no_bit(whole: tuple[Path, Spy, dict[str, Tensor]], step: int, tmp_path: Path) -> None:
    folder, _, weights = whole
    cut = tmp_path / folder.name  # streams know the name of their folder
    shutil.copytree(folder, cut)
    for path in (cut / "checkpoints").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    resumed = run(cut, 9, selections=SELECTIONS, steps=STEPS)
    assert all(torch.equal(weight, resumed[name]) for name, weight in weights.items())
    assert (cut / "rewards.jsonl").read_bytes() == (folder / "rewards.jsonl").read_bytes()
    assert metrics(cut) == metrics(folder)


def test_at_the_cap_groups_without_variance_stay_and_move_nothing(tmp_path, monkeypatch, capsys):
    spy = Spy(monkeypatch)
    weights = run(tmp_path, 2, steps=2, verify=lambda *_: "wrong")
    assert [(step, len(prompts)) for step, prompts in drawn(tmp_path)] == [(s, 2) for s in (0, 0, 0, 1, 1, 1)]
    assert [row[2] for rows in spy.trained.values() for row in rows] == [0.0] * 16
    before = policy().model.state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
    for line in metrics(tmp_path):
        assert (line["dynamic_sampling/extra"], line["dynamic_sampling/equal_after"]) == (2, 1)
    assert "after 2 refills" in capsys.readouterr().err


def test_several_batches_of_a_step_and_several_steps_of_a_batch(tmp_path, monkeypatch):
    accumulated = ("trainer.gradient_accumulation_steps=2", "trainer.steps_per_generation=1")
    spy = Spy(monkeypatch)
    run(tmp_path / "accumulated", 9, *accumulated)
    assert len(spy.trained[0]) == 16
    assert all(advantage != 0 for *_, advantage in spy.trained[0])
    spy.trained.clear()
    twice = ("trainer.num_iterations=2", "trainer.save_steps=2")
    run(tmp_path / "twice", 9, *twice, steps=2)
    assert sorted(spy.trained[0]) == sorted(spy.trained[1])
    assert all(advantage != 0 for *_, advantage in spy.trained[0])


class Script:
    """Stands for TRL and the verifier: hands out groups of two by a list of rewards, one column wider every time."""

    def __init__(self, *rewards: list[float | None]) -> None:
        self.reward: Any = SimpleNamespace(latest=None)
        self.asked: list[int] = []
        self._rewards = iter(rewards)

    def __call__(self, prompts: int) -> dict[str, Tensor]:
        self.asked.append(prompts)
        rewards, width = next(self._rewards), len(self.asked)
        rows, name = len(rewards), f"b{width}"
        self.reward.latest = Judged(
            [f"{name}g{row // 2}" for row in range(rows)], [[9] * width] * rows, rewards, ["?"] * rows
        )
        return {
            "prompt_ids": torch.full((rows, width), 7),
            "prompt_mask": torch.ones(rows, width, dtype=torch.long),
            "completion_ids": torch.full((rows, width), 10 * width),
            "completion_mask": torch.ones(rows, width, dtype=torch.long),
            "old_per_token_logps": torch.full((rows, width), -float(width)),
            "importance_sampling_ratio": torch.full((rows, 1), float(width)),
            "advantages": torch.tensor([0.0 if value is None else value for value in rewards]),
            "num_items_in_batch": torch.tensor(rows * width),
        }


def test_by_hand_only_what_is_missing_is_sampled_and_put_in_its_place() -> None:
    script = Script([1, 1, 1, 0, 0, 0], [1, 1 + 1e-9, 0, 1], [0, None])
    sampling = DynamicSampling(script.reward, 2, 2, pad_id=5)
    refilled = sampling.fill(script, 3)
    assert script.asked == [3, 2, 1]
    assert (refilled.equal_before, refilled.equal_after, refilled.extra) == (2 / 3, 1 / 3, 2)
    assert refilled.trained.judged.prompt_ids == ["b2g1", "b2g1", "b1g1", "b1g1", "b1g2", "b1g2"]
    assert refilled.trained.judged.rewards == [0, 1, 1, 0, 0, 0]
    tensors = refilled.trained.tensors
    # the widest batch has no row left, so its third column is gone
    assert tensors["prompt_ids"].tolist() == [[7, 7]] * 2 + [[5, 7]] * 4
    assert tensors["prompt_mask"].tolist() == [[1, 1]] * 2 + [[0, 1]] * 4
    assert tensors["completion_ids"].tolist() == [[20, 20]] * 2 + [[10, 5]] * 4
    assert tensors["completion_mask"].tolist() == [[1, 1]] * 2 + [[1, 0]] * 4
    assert tensors["old_per_token_logps"].tolist() == [[-2, -2]] * 2 + [[-1, 0]] * 4
    assert tensors["importance_sampling_ratio"].flatten().tolist() == [2, 2, 1, 1, 1, 1]
    assert tensors["advantages"].tolist() == [0, 1, 1, 0, 0, 0]
    assert tensors["num_items_in_batch"].item() == 8


def test_a_full_batch_is_handed_on_untouched() -> None:
    script = Script([1, 0, 0, 1])
    refilled = DynamicSampling(script.reward, 2, 5, pad_id=5).fill(script, 2)
    assert refilled.trained.tensors["num_items_in_batch"].item() == 4
    assert script.asked == [2]


@pytest.mark.parametrize("override", ["scale_rewards=batch", "multi_objective_aggregation=normalize_then_sum"])
def test_advantages_that_cross_groups_are_refused(override: str, tmp_path: Path) -> None:
    overrides = [*SETTINGS, "train.stages=1", f"trainer.{override}"]
    grpo_config(load_config("quickstart", overrides), tmp_path, torch.device("cpu"))
    config = load_config("quickstart", [*overrides, "train.dynamic_sampling=1"])
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        grpo_config(config, tmp_path, torch.device("cpu"))
