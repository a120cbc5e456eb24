"""Influence told of a group in a real training equals autograd's for it alone, whatever TRL's loss divides by."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.runs import SMALL, cropi_ok
from torch import Tensor

from cropi.gradients.training_influence import Direction, LowRank
from cropi.policy import completion_logprobs
from cropi.stages.online_loop import OnlineLoop
from cropi.training.group_evidence import GroupEvidence, GroupOutcome
from cropi.training.stage_trainer import StageTrainer

SETTINGS = [
    *(text for text in SMALL if not text.startswith(("select.", "train.", "trainer."))),
    *("select.strategy={type: cropi}", "train.stages=1", "train.steps_per_stage=3", "name=run"),
    *("trainer.per_device_train_batch_size=8", "trainer.gradient_accumulation_steps=4"),
]


def dense(part: LowRank | Tensor) -> Tensor:
    return part.left @ part.right if isinstance(part, LowRank) else part


def along(gradient: dict[str, Tensor], direction: Direction) -> float:
    return sum(float((gradient[name] * dense(part)).sum()) for name, part in direction.items())


def by_autograd(loop: OnlineLoop, rewards: list[float], prompt: tuple[int, ...], own: list[list[int]]) -> np.ndarray:
    """Sets x halves of the direction: the whole group's descent gradient, with Z of the loss."""
    by_length = loop.normalizer.settings.loss_type == "grpo"
    known, longest = np.array(rewards), loop.normalizer.settings.max_completion_length
    advantages = (known - known.mean()) / (known.std(ddof=1) + 1e-4)
    lengths = [len(ids) if by_length else longest for ids in own]
    weights = torch.tensor(advantages / (len(own) * np.array(lengths)))
    with torch.enable_grad():
        logprobs, _ = completion_logprobs(loop.model, [prompt] * len(own), own, temperature=1.0)
        parameters = dict(loop.model.named_parameters())
        gradients = torch.autograd.grad(-(weights[:, None] * logprobs).sum(), list(parameters.values()))
    found = dict(zip(parameters, gradients, strict=True))
    sets = loop.validation.directions.values()
    return np.array([[along(found, half) for half in each.halves] for each in sets])


def scaled(made: Callable[..., None]) -> Callable[..., None]:
    """A trainer with the loss scale of float16, which accelerate gives no CPU."""

    def make(self: StageTrainer, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    return make


@pytest.mark.parametrize(
    ("loss", "precision"),
    [
        ("grpo", "float32"),
        ("dapo", "scaled"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("dr_grpo", "float32"), ("bnpo", "float32"))),
        pytest.param("grpo", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_it_equals_autograd(loss: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish, end = GroupEvidence.finish, OnlineLoop.end_generation_batch
    outcomes: list[GroupOutcome] = []
    compared = list[float]()

    def finished(self: GroupEvidence, judged: object) -> list[GroupOutcome]:
        outcomes[:] = finish(self, judged)  # type: ignore[arg-type]
        return outcomes

    def ended(self: OnlineLoop, step: int) -> None:
        end(self, step)
        judged = self.reward.latest
        for number, outcome in enumerate(outcomes):
            if outcome.influence_VCH is None or len(set(outcome.rewards)) < 2:
                continue
            own = judged.completion_ids[number * 8 : number * 8 + 8]
            wanted = by_autograd(self, list(outcome.rewards), self.evidence.prompt_tokens[outcome.prompt_id], own)
            compared.append(float(np.abs(outcome.influence_VCH.sum(1) - wanted).max() / np.abs(wanted).max()))

    if precision == "scaled":
        monkeypatch.setattr(StageTrainer, "__init__", scaled(StageTrainer.__init__))
    monkeypatch.setattr(GroupEvidence, "finish", finished)
    monkeypatch.setattr(OnlineLoop, "end_generation_batch", ended)
    settings = [*SETTINGS, f"trainer.loss_type={loss}", f"trainer.bf16={precision == 'bfloat16'}".lower()]
    cropi_ok("run", "quickstart", *settings, cwd=tmp_path)
    assert len(compared) >= 3
    assert max(compared) < (0.1 if precision == "bfloat16" else 1e-4)
