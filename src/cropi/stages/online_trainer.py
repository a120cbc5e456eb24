"""A trainer that reads influence in its own backward passes, and trains on the prompts that its curriculum chooses."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from cropi.parallel import process_group
from cropi.stages.online_loop import ChooserLoop
from cropi.streams import append_jsonl, cut_jsonl
from cropi.training.dynamic_sampling import only_groups
from cropi.training.reward_log import Judged
from cropi.training.stage_trainer import StageTrainer


class ReadsInfluence(GRPOTrainer):
    """Gives every generation batch's rewards and influence to a `ChooserLoop`.

    It wraps `training_step` and `compute_loss`: the reader has to enclose forward and backward of a micro-batch, and
    only the loss's inputs tell whose rows these are.
    """

    online: ChooserLoop | None = None
    _micro_steps = 0
    _reading: ExitStack | None = None

    @property
    def is_between_batches(self) -> bool:
        """Whether the next micro-step samples a generation batch."""
        return self._micro_steps % (self.args.steps_per_generation * self.num_iterations) == 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """TRL's, inside the reader for the passes that the loop wants to read."""
        if self.online is None:
            return super().training_step(model, inputs, num_items_in_batch)
        micro_step = self._micro_steps % (self.args.steps_per_generation * self.num_iterations)
        self._micro_steps += 1
        first_pass = micro_step < self.args.steps_per_generation  # in a further iteration the policy has moved
        if first_pass and self.online.reader is not None:
            with ExitStack() as self._reading:
                loss = super().training_step(model, inputs, num_items_in_batch)
            self._reading = None
            self.online.end_micro_batch()
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if micro_step == self.args.steps_per_generation - 1:
            self.online.end_generation_batch(self.state.global_step)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's; the loop sees which rows it is of."""
        if self.online is not None and self._reading is not None:
            accumulated = self.current_gradient_accumulation_steps
            self._reading.enter_context(self.online.micro_batch(inputs, accumulated, loss_scale(self)))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class StepRecord(TrainerCallback):
    """Writes the seconds of every step with what was read in it, and the numbers that are logged."""

    def __init__(self, trainer: ReadsInfluence, folder: Path) -> None:
        self._trainer, self._folder = trainer, folder

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if process_group().is_main:  # what an interrupted attempt recorded beyond its checkpoint
            for name in ("steps.jsonl", "metrics.jsonl"):
                cut_jsonl(self._folder / name, lambda row: row["step"] <= state.global_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        ranks, online = process_group(), self._trainer.online
        read = 0.0 if online is None else online.read_passes()
        line = {"step": state.global_step, "seconds": (time.perf_counter() - self._began) * ranks.size}
        self._note("steps.jsonl", line | ({"read_passes": read} if read else {}) | ranks.facts())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        finite = {k: v for k, v in kwargs["logs"].items() if isinstance(v, int | float) and abs(v) < float("inf")}
        self._note("metrics.jsonl", finite | {"step": state.global_step})

    def _note(self, name: str, line: Mapping[str, Any]) -> None:
        if process_group().is_main:
            append_jsonl(self._folder / name, line)


def loss_scale(trainer: GRPOTrainer) -> float:
    """The factor of mixed precision on the loss that is differentiated."""
    if trainer.is_deepspeed_enabled:
        return float(getattr(trainer.model_wrapped.optimizer, "loss_scale", None) or 1.0)
    scaler = getattr(trainer.accelerator, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


class OnlineTrainer(ReadsInfluence, StageTrainer):
    """The trainer of `cropi run` with a curriculum."""

    def _get_train_sampler(self, dataset: datasets.Dataset | None = None) -> Sampler[int]:
        if self.online is None:
            return super()._get_train_sampler(dataset)
        self.stage_sampler = self.online.sampler
        return self.online.sampler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the curriculum's numbers."""
        super().log(logs | ({} if self.online is None else self.online.metrics()), start_time)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        kept = None if self.online is None else self.online.kept_groups()
        return output if kept is None else only_groups(output, kept, self.num_generations, self.args.pad_to_multiple_of)

    def _drop(self, judged: Judged) -> None:
        if self.online is not None:
            self.online.drop_groups(judged)
