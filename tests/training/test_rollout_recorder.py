"""Rollouts of training kept as trajectories: against the policy of their step, and against what TRL trained on."""

import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.runs import judge
from tests.stages.test_train import ROWS, policy, verdict

from cropi.artifacts import TRAJECTORIES, read_table
from cropi.config import PolicyConfig
from cropi.errors import ArtifactError, ConfigError
from cropi.loading import load_config
from cropi.policy import completion_logprobs, load_policy
from cropi.stages.train import TrainTask, train_stages
from cropi.stages.trajectories import newest_rollouts
from cropi.training.grpo_settings import grpo_config
from cropi.training.reward_log import RecordedReward
from cropi.training.rollout_recorder import RolloutRecorder, dropouts, forget_rollouts, rollout_files, written_rollouts
from cropi.training.stage_trainer import StageTrainer

STEPS, TEMPERATURE, GENERATIONS = 4, 0.7, 4
END_OF_SEQUENCE = 1
ACCUMULATED = ("trainer.gradient_accumulation_steps=4", "trainer.steps_per_generation=2")
SETTINGS = [
    "train.stages=1",
    f"train.steps_per_stage={STEPS}",
    "collect.max_completion_length=6",
    f"collect.temperature={TEMPERATURE}",
    "trainer={num_generations: 4, per_device_train_batch_size: 8, learning_rate: 1e-3, save_strategy: steps}",
    "trainer.save_total_limit=9",
    "trainer.save_steps=1",
    "select.strategy=influence",
    "refresh.reuse_rollouts=true",
]


def run(folder: Path, *overrides: str, record: bool = True) -> dict[str, torch.Tensor]:
    settings = load_config("quickstart", [*SETTINGS, *overrides])
    task = TrainTask(
        label="test",
        rows=ROWS,
        settings=grpo_config(settings, folder / "checkpoints", torch.device("cpu")),
        stages=1,
        steps_per_stage=STEPS,
        evaluate_every=STEPS,
        reward=RecordedReward(judge(verdict), folder / "rewards.jsonl"),
        select_stage=lambda *_: [row["prompt_id"] for row in ROWS[:8]],  # whole generation batches
        evaluate=lambda *_: None,
        folder=folder,
        record_to=folder / "rollouts" if record else None,
    )
    return load_file(train_stages(task, policy()) / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of a recorded training, and its weights."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(folder)


def recorded(folder: Path) -> dict[tuple[int, int], list[dict[str, Any]]]:
    return {key: read_table(path, TRAJECTORIES).to_pylist() for key, path in rollout_files(folder / "rollouts").items()}


@torch.no_grad()
def differences(folder: Path, step: int, rows: list[dict[str, Any]], temperature: float = TEMPERATURE) -> torch.Tensor:
    """|stored log-prob - that of the policy after `step` steps|, by a forward pass of its own, of all tokens."""
    path = None if step == 0 else str(folder / "checkpoints" / f"checkpoint-{step}")
    model = load_policy(PolicyConfig(path="builtin", cpu_threads=1), path).model
    expected, mask = completion_logprobs(
        model, [r["prompt_ids"] for r in rows], [r["completion_ids"] for r in rows], temperature=temperature
    )
    stored = torch.tensor([value for row in rows for value in row["behaviour_logprobs"]])
    return (stored - expected[mask]).abs()


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
        assert all(len(rows) == GENERATIONS for rows in found.values())
        return found


def as_trained(rows: list[dict[str, Any]]) -> Counter[Any]:
    """Recorded rows in the spy's terms; advantages from the rewards by hand."""
    found: Counter[Any] = Counter()
    for prompt_id in {row["prompt_id"] for row in rows}:
        group = [row for row in rows if row["prompt_id"] == prompt_id]
        assert [row["sample"] for row in group] == [0, 1, 2, 3]
        rewards = torch.tensor([row["reward"] for row in group])
        advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()
        for row, advantage in zip(group, advantages, strict=True):
            found[tuple(row["prompt_ids"]), tuple(row["completion_ids"]), round(advantage, 3)] += 1
    return found


@pytest.mark.parametrize(
    ("overrides", "batches"),
    [
        ((), [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)]),
        # two generation batches in a step, each split over two micro-steps and shuffled
        (ACCUMULATED, [(step, batch, 0) for step in range(4) for batch in range(2)]),
        # two steps on a generation batch: TRL takes the log-probs of the sampling policy itself
        (("trainer.num_iterations=2", "trainer.save_steps=2"), [(0, 0, 0), (2, 0, 0)]),
    ],
    ids=["plain", "accumulated", "two updates"],
)
def test_rollouts_are_what_was_trained_on_with_the_log_probs_of_the_policy_that_sampled(
    overrides: tuple[str, ...], batches: list[tuple[int, int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    run(tmp_path, *overrides)
    found = recorded(tmp_path)
    assert list(found) == batches
    for step in {step for step, *_ in batches}:
        rows = [row for key, part in found.items() if key[0] == step for row in part]
        own = differences(tmp_path, step, rows)
        assert float(own.max()) < 2e-5
        if step == 0:  # the test can tell: the policy does move, and temperature matters
            assert float(differences(tmp_path, STEPS, rows).max()) > 1e-2
            assert float(differences(tmp_path, step, rows, 1.0).max()) > 1e-2
        parts = [as_trained(part) for key, part in found.items() if key[0] == step]
        assert sum(parts, Counter()) == Counter((*tokens, round(a, 3)) for *tokens, a in spy.trained[step])
        for row in rows:
            assert row["reward"] == float(verdict(row["completion"], "") == "correct")
            assert (row["status"] == "ok") == (row["completion_ids"][-1] == END_OF_SEQUENCE)


def test_under_mixed_precision_they_are_near_the_plain_policys(tmp_path: Path) -> None:
    run(tmp_path, "trainer.bf16=true")
    for (step, *_), rows in recorded(tmp_path).items():
        assert 1e-4 < float(differences(tmp_path, step, rows).mean()) < 0.02


def test_recording_changes_no_weight_and_a_resumed_run_records_the_same(
    whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    (folder, weights), cut = whole, tmp_path / "cut" / "run"
    silent = run(tmp_path / "silent", record=False)
    assert not (tmp_path / "silent" / "rollouts").exists()
    assert all(torch.equal(weight, silent[name]) for name, weight in weights.items())
    shutil.copytree(folder, cut)
    for step in (3, 4):
        shutil.rmtree(cut / "checkpoints" / f"checkpoint-{step}")
    left = rollout_files(cut / "rollouts")
    left[3, 0, 0].unlink()  # killed in the step that wrote it
    left[2, 0, 0].write_bytes(left[1, 0, 0].read_bytes())  # of the attempt that was cut off: to be made anew
    run(cut)
    ours, again = ({p.name: p.read_bytes() for p in (place / "rollouts").iterdir()} for place in (folder, cut))
    assert len(written_rollouts(folder / "rollouts")) == STEPS
    assert again == ours


@pytest.mark.parametrize("damage", ["flip", "swap", "remove", "forgotten"])
def test_rollouts_that_were_changed_are_not_used(
    damage: str, whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    shutil.copytree(whole[0] / "rollouts", tmp_path / "rollouts")
    left = rollout_files(tmp_path / "rollouts")
    match damage:
        case "flip":
            data = left[1, 0, 0].read_bytes()
            left[1, 0, 0].write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        case "swap":
            left[1, 0, 0].write_bytes(left[2, 0, 0].read_bytes())
        case "remove":
            left[1, 0, 0].unlink()
        case "forgotten":
            (tmp_path / "rollouts" / "written-000.jsonl").unlink()
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match=r"part-000001-000\.parquet|written-000\.jsonl"):
        newest_rollouts(tmp_path / "rollouts", 0, STEPS, tmp_path / "out")


class Fake:
    """A reward that has judged six completions: two groups of p, and a prompt with two completions only."""

    def recorder(self, folder: Path, rewards: list[float | None]) -> RolloutRecorder:
        reward = RecordedReward(judge(lambda *_: "correct"), folder / "rewards.jsonl")
        state = type("State", (), {"global_step": 5})()
        texts = [f"t{n}" for n in range(len(rewards))]
        reward(texts, ["1"] * 6, ["p", "p", "p", "p", "q", "q"], [[7], [7, 1], [8], [9], [2], [3]], trainer_state=state)
        assert reward.latest is not None
        reward.latest.rewards[:] = rewards  # type: ignore[index]
        recorder = RolloutRecorder(folder / "rollouts", reward, 2, [1])
        recorder.begin(5, [[4]] * 6)
        return recorder


def test_only_complete_groups_count_and_the_last_of_a_prompt(tmp_path: Path) -> None:
    recorder = Fake().recorder(tmp_path, [1.0, 0.0, 0.0, 1.0, 1.0, None])
    logprobs = -torch.arange(12, dtype=torch.float32).reshape(6, 2)
    recorder.note([5, 2], logprobs[[5, 2]])
    recorder.note([2], logprobs[[0]])  # a second pass over a row: by then the policy has moved
    assert rollout_files(tmp_path / "rollouts") == {}
    recorder.note([0, 1, 3, 4], logprobs[[0, 1, 3, 4]])
    rows = recorded(tmp_path)[5, 0, 0]
    assert [(r["prompt_id"], r["completion_ids"], r["behaviour_logprobs"]) for r in rows] == [
        ("p", [8], [-4.0]),
        ("p", [9], [-6.0]),
    ]


def test_groups_of_log_probs_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    recorder = Fake().recorder(tmp_path, [1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    logprobs = torch.zeros(6, 2)
    logprobs[3, 0] = float("nan")
    recorder.note(range(6), logprobs)
    rows = recorded(tmp_path)[5, 0, 0]
    assert [(r["prompt_id"], r["completion_ids"], r["status"]) for r in rows] == [
        ("p", [7], "truncated"),
        ("p", [7, 1], "ok"),
        ("q", [2], "truncated"),
        ("q", [3], "truncated"),
    ]
    assert rows[1]["behaviour_logprobs"] == [0.0, 0.0]
    forget_rollouts(tmp_path / "rollouts", 6)
    assert len(recorded(tmp_path)) == 1
    forget_rollouts(tmp_path / "rollouts", 5)
    assert recorded(tmp_path) == {}


def test_dropout_is_found() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.0), torch.nn.Dropout(0.1), torch.nn.Linear(2, 2))
    model[2].attention_dropout = 0.2  # type: ignore[assignment]
    assert dropouts(model) == ["1", "2"]
    assert dropouts(policy().model) == []


@pytest.mark.parametrize(
    "override", ["top_k=5", "min_p=0.1", "repetition_penalty=1.2", "mask_truncated_completions=true"]
)
def test_sampling_whose_log_probs_are_not_known_is_refused(override: str, tmp_path: Path) -> None:
    settings = load_config("quickstart", [*SETTINGS, f"trainer.{override}"])
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        grpo_config(settings, tmp_path, torch.device("cpu"))
