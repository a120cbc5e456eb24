"""kill -9 at exact moments of a run, then the same command: it ends like a run that nobody disturbed."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.runs import SMALL, cropi_ok, evaluations, json_lines, selections

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

RUN = Path("runs/run")
STEPS = 10  # of two stages; the second round of validation completions is before step 8
CHECKPOINTS = ["trainer.save_strategy=steps", "trainer.save_steps=2", "train.steps_per_stage=5"]
COMMON = [*(text for text in SMALL if not text.startswith(("select.", "trainer.per_device", "train.steps")))]
COMMON += ["trainer.per_device_train_batch_size=16", "trainer.gradient_accumulation_steps=2", "name=run", *CHECKPOINTS]
STRATEGIES = {
    "cropi": ["select.strategy={type: cropi}"],
    "influence": ["select.strategy={type: influence}", "select.fraction=0.25"],
}
TRAIN, ONLINE, PASS = "cropi.stages.train", "cropi.stages.online", "cropi.stages.validation_pass:ValidationPass"

# moment: (when, where, function, its call)
CROPI: dict[str, tuple[str, str, str, str]] = {
    "before the prompts' representations are finished": ("after", "cropi.stages.collect", "represent", "1"),
    "between the first validation completions and their gradient": ("before", PASS, "differentiate", "1"),
    "at the end of the first validation round": ("after", PASS, "differentiate", "1"),
    "after the first step, before any checkpoint": ("after", f"{ONLINE}:OnlineRun", "_choose", "3"),
    "with a batch judged and not trained on": ("after", "cropi.training.reward_log:RecordedReward", "__call__", "4"),
    "in the middle of a generation batch": ("after", "cropi.gradients.training_influence:Reader", "take", "9"),
    "in a checkpoint, after its weights": ("before", "transformers:Trainer", "_save_optimizer_and_scheduler", "2"),
    "in a checkpoint, with half the state": ("before", "cropi.stages.online_loop", "write_sealed", "2"),
    "in a checkpoint, before its manifest": ("before", TRAIN, "finish", "2"),
    "with a checkpoint too many": ("before", "shutil", "rmtree", "1"),
    "between two stages, in the beliefs": ("after", ONLINE, "write_batches", "1"),
    "in an evaluation": ("before", TRAIN, "evaluate", "3"),
    "in the second validation round": ("before", PASS, "differentiate", "2"),
    "at the last step": ("after", f"{ONLINE}:OnlineRun", "_keep_beliefs", "2"),
}
INFLUENCE: dict[str, tuple[str, str, str, str]] = {
    "in the middle of collecting": ("after", "cropi.stages.collect", "_found", "2"),
    "in the scores of the first stage": ("after", "cropi.stages.score", "score_pool", "1"),
    "in the middle of a stage": ("after", "cropi.training.reward_log:RecordedReward", "__call__", "4"),
    "in the scores of the second stage": ("before", "cropi.stages.score", "score_pool", "2"),
}
MOMENTS = [("cropi", *each) for each in CROPI.items()] + [("influence", *each) for each in INFLUENCE.items()]


def arguments(strategy: str) -> list[str]:
    return ["run", "quickstart", *COMMON, *STRATEGIES[strategy]]


def outcome(folder: Path) -> dict[str, Any]:
    """All that has to be the same: what was chosen, sampled and learned."""
    last = folder / "checkpoints" / f"checkpoint-{STEPS}"
    found: dict[str, Any] = {"rewards": json_lines(folder / "rewards.jsonl"), "selections": selections(folder)}
    found |= {"evaluations": evaluations(folder), "weights": (last / "model.safetensors").read_bytes()}
    if (folder / "choices.jsonl").exists():
        found |= {"choices": json_lines(folder / "choices.jsonl"), "state": (last / "curriculum.json").read_bytes()}
    return found | {"beliefs": {path.name: path.read_bytes() for path in folder.glob("beliefs/*/*.parquet")}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    found = {}
    for strategy in STRATEGIES:
        cwd = tmp_path_factory.mktemp(strategy)
        cropi_ok(*arguments(strategy), cwd=cwd)
        found[strategy] = outcome(cwd / RUN)
    assert len(found["cropi"]["choices"]) == len(found["influence"]["rewards"]) == STEPS
    assert len(found["influence"]["selections"]) == 2 * 2
    return found


@pytest.mark.parametrize(("strategy", "moment", "call"), MOMENTS, ids=[f"{one}: {at}" for one, at, _ in MOMENTS])
def test_a_killed_run_ends_like_an_undisturbed_one(strategy, moment, call, undisturbed, tmp_path):
    dying = [sys.executable, str(Path(__file__).with_name("dying.py")), *call, *arguments(strategy)]
    killed = subprocess.run(dying, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, f"it was not killed {moment}: {killed.stderr}"
    cropi_ok(*arguments(strategy), cwd=tmp_path)
    ours, wanted = outcome(tmp_path / RUN), undisturbed[strategy]
    assert [name for name in wanted if ours.get(name) != wanted[name]] == []
