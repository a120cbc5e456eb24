"""What of TRL reading influence stands on. A failure here names what changed, before a wrong number shows it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests.runs import grpo_args
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOTrainer

from cropi.config import PolicyConfig
from cropi.policy import load_policy
from cropi.training.group_evidence import BY_BATCH, BY_SEQUENCE, loss_rows

ACCUMULATED = "self.current_gradient_accumulation_steps"
NORMALISERS = {  # loss types of LossNormalizer: what TRL divides by
    "grpo, sapo": "((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()",
    "bnpo": "(per_token_loss * mask).sum() / mask.sum().clamp(min=1.0)",
    "dr_grpo": "(per_token_loss * mask).sum() / (per_token_loss.size(0) * self.max_completion_length)",
    "cispo, dapo, vespo": 'inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes',
    "cispo, dapo, vespo over steps": f"normalizer * {ACCUMULATED} / self.args.steps_per_generation",
    "luspo": "(per_token_loss * mask).sum(-1).mean()",
}
PROMPTS = [f"sum mod 7 : {n % 7} {n // 7} 5 =" for n in range(20)]
STEPS, ACCUMULATION, SERVED, ROWS, GENERATIONS = 4, 2, 4, 4, 2  # a generation batch serves two optimiser steps


@pytest.mark.parametrize("losses", NORMALISERS)
def test_losses_are_divided_as_they_were(losses: str) -> None:
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert NORMALISERS[losses] in source, (
        f"TRL divides {losses} by something else: group_evidence.LossNormalizer undoes it"
    )


def test_losses_are_grouped_as_they_were() -> None:
    source = inspect.getsource(GRPOTrainer._compute_loss)
    for losses in (BY_SEQUENCE, sorted(BY_BATCH)):
        quoted = ", ".join(f'"{loss}"' for loss in losses)
        found = f"self.loss_type in [{quoted}]" in source
        assert found, f"TRL treats {quoted} apart: group_evidence.LossNormalizer takes them together"


@dataclass
class Seen:
    """Events of a training in their order, and the rows of generation batches and of losses."""

    events: list[str] = field(default_factory=list)
    sampled: list[list[tuple[str, tuple[int, ...]]]] = field(default_factory=list)
    losses: list[dict[str, Tensor]] = field(default_factory=list)
    accumulated: list[int] = field(default_factory=list)


class Watched(GRPOTrainer):
    seen: Seen

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.seen.events.append("begin")
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.seen.events.append("end")
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        self.seen.events.append("loss")
        self.seen.losses.append(dict(inputs))
        self.seen.accumulated.append(self.current_gradient_accumulation_steps)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Watched, Seen]:
    policy, seen = load_policy(PolicyConfig(path="builtin")), Seen()

    def reward(prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        seen.events.append("judged")
        seen.sampled.append([(text, tuple(ids)) for text, ids in zip(prompts, completion_ids, strict=True)])
        return [float(number % 2) for number in range(len(prompts))]

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.events.append("step")

    sizes = {"max_steps": STEPS, "per_device_train_batch_size": ROWS, "gradient_accumulation_steps": ACCUMULATION}
    sizes |= {"steps_per_generation": SERVED, "num_generations": GENERATIONS, "max_completion_length": 8}
    settings = grpo_args(tmp_path_factory.mktemp("watched"), **sizes)
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    trainer = Watched(policy.model, reward, settings, train_dataset=dataset, processing_class=policy.tokenizer)
    trainer.seen = seen
    policy.model.get_output_embeddings().weight.register_hook(lambda _: seen.events.append("backward"))
    trainer.add_callback(Steps())
    trainer.train()
    return trainer, seen


def test_a_training_step_judges_then_computes_one_loss_and_differentiates_it(watched: tuple[Watched, Seen]) -> None:
    """The reader encloses a training step; the loop is told of rewards when its last loss is differentiated."""
    micro_step = ["begin", "loss", "backward", "end"]
    first = ["begin", "judged", *micro_step[1:]]
    batch = [*first, *micro_step, "step", *micro_step, *micro_step, "step"]
    assert watched[1].events == batch * (STEPS * ACCUMULATION // SERVED)


def test_a_loss_says_how_many_are_accumulated(watched: tuple[Watched, Seen]) -> None:
    assert watched[1].accumulated == [ACCUMULATION] * (STEPS * ACCUMULATION)


def test_the_rows_of_losses_are_those_that_were_sampled(watched: tuple[Watched, Seen]) -> None:
    """Once each, under the names and in the layout that `loss_rows` reads; the reward function has the same tokens."""
    trainer, seen = watched
    tokenizer: Any = trainer.processing_class
    assert len(seen.sampled) == STEPS * ACCUMULATION // SERVED
    for number, sampled in enumerate(seen.sampled):
        slices = seen.losses[number * SERVED : (number + 1) * SERVED]
        rows = [row for inputs in slices for row in loss_rows(inputs, tokenizer.pad_token_id)]
        wanted = [(tuple(tokenizer(text)["input_ids"]), completion) for text, completion in sampled]
        assert sorted((row.prompt, row.completion) for row in rows) == sorted(wanted)
        counted = sum(int(inputs["completion_mask"].sum()) for inputs in slices)
        assert {int(inputs["num_items_in_batch"]) for inputs in slices} == {counted}


def test_groups_are_neighbours_where_they_are_judged(watched: tuple[Watched, Seen]) -> None:
    for sampled in watched[1].sampled:
        texts = [text for text, _ in sampled]
        groups = [texts[start : start + GENERATIONS] for start in range(0, len(texts), GENERATIONS)]
        assert all(len(set(group)) == 1 for group in groups)
        assert len({group[0] for group in groups}) == len(groups)


def test_what_scales_a_loss_is_found_where_it_was(watched: tuple[Watched, Seen]) -> None:
    trainer = watched[0]
    assert hasattr(trainer.accelerator, "scaler"), "accelerate has no Accelerator.scaler any more: loss_scale reads it"
    assert trainer.is_deepspeed_enabled is False
    assert isinstance(trainer.accelerator.unwrap_model(trainer.model), torch.nn.Module)
