"""TRL's GRPOTrainer on the prompts that a selector chooses, stage by stage."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cropi.artifacts import append_jsonl, is_finished, read_jsonl, write_text
from cropi.console import say
from cropi.errors import ArtifactError, ConfigError, UserError
from cropi.functional.surrogate import NORMALIZER_OF_LOSS
from cropi.pipeline import Given, Pipeline
from cropi.policy import Policy
from cropi.rewards.verdicts import CORRECT, UNPARSEABLE_GOLD, WRONG, Answered, Judgement, reward
from cropi.training.train import Staged, Stages
from cropi.trl.selector import PROMPT_ID, Selector, make_config, prompt_ids
from trl import GRPOConfig, GRPOTrainer

HASHED_BYTES = 1 << 20  # of every weight matrix, for the policy's identity


class CurriculumTrainer(Staged):
    """`GRPOTrainer` with one argument more: `selector`. All others, and all that it does with them, are TRL's.

    Training takes as many steps as it would without (`max_steps`, or `num_train_epochs` over the whole set), divided
    into `selector.stages` stages of equal length, rounded up to whole generation batches. Reward functions, PEFT,
    callbacks, logging, saving and `train(resume_from_checkpoint=...)` are as in TRL. In several processes the first one
    chooses and the others wait for it (`args.ddp_timeout` must allow for that).

    Errors: ConfigError for what cannot be combined with a curriculum (iterable datasets, sharded weights, losses
    without a per-prompt normaliser); what `Selector` and its settings refuse.
    """

    def __init__(self, *args: Any, selector: Selector, **kwargs: Any) -> None:
        bound = inspect.signature(GRPOTrainer.__init__).bind_partial(None, *args, **kwargs).arguments
        dataset = bound.get("train_dataset")
        if not isinstance(dataset, Dataset):
            raise ConfigError(
                f"the training set is a {type(dataset).__name__}, and prompts are chosen by their place",
                where="train_dataset",
                fix="give a datasets.Dataset (list(stream) into Dataset.from_list, say).",
            )
        ids = prompt_ids(dataset, "train_dataset")
        marked = dataset if PROMPT_ID in dataset.column_names else dataset.add_column(PROMPT_ID, ids)
        bound = {name: value for name, value in bound.items() if name != "self"} | {"train_dataset": marked}
        more = bound.pop("kwargs", {})
        super().__init__(**bound, **more)
        self._selector, self._positions = selector, {prompt_id: row for row, prompt_id in enumerate(ids)}
        self._success = _success(selector, self.reward_funcs, self.reward_func_names)
        self._check()
        self.steps_per_stage = self._stage_length()
        self.args.max_steps = selector.stages * self.steps_per_stage
        self._folder = Path(selector.folder or Path(self.args.output_dir) / "curriculum")
        self._pipeline: Pipeline | None = None
        self._identity = _identity(self.accelerator.unwrap_model(self.model))
        self.add_callback(_StageStart(self))

    def _check(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                "the weights are sharded, and the process that chooses needs all of them",
                where="args (fsdp or deepspeed)",
                fix="train with plain data parallelism, or choose beforehand with `cropi select`.",
            )
        if self.args.loss_type not in NORMALIZER_OF_LOSS:
            raise ConfigError(
                f"no per-prompt normaliser is known for the loss {self.args.loss_type!r}",
                where="args.loss_type",
                fix=f"use one of {', '.join(NORMALIZER_OF_LOSS)}.",
            )
        if self.chat_template_kwargs:
            raise ConfigError(
                "the prompts that are chosen by are encoded by the template's defaults",
                where="args.chat_template_kwargs",
                fix="put them into the template, or leave them out.",
            )
        if self._selector.stages < 1:
            raise ConfigError("a curriculum has stages", where="Selector.stages", fix="give 1 or more.")

    def _stage_length(self) -> int:
        """Optimiser steps of a stage: a whole number of generation batches."""
        arguments = self.args
        serves = arguments.steps_per_generation * self.num_iterations  # micro-steps of a generation batch
        accumulated = arguments.gradient_accumulation_steps
        if arguments.max_steps > 0:
            total = float(arguments.max_steps)
        else:
            batches = len(self._positions) // (arguments.generation_batch_size // self.num_generations)
            total = arguments.num_train_epochs * batches * serves / accumulated
        unit = serves // math.gcd(serves, accumulated)
        return max(1, math.ceil(total / self._selector.stages / unit)) * unit

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's; the curriculum's folder is this training's while it lasts."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._pipeline is not None:
                self._pipeline.space.unlock()
                self._pipeline = None

    # -- choosing --------------------------------------------------------------------------------------------------

    def choose(self, stage: int, model: nn.Module, in_progress: bool) -> Sequence[str]:
        """Prompt ids of a stage, chosen by the first process and told to the others."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                found = [self._chosen(stage, model, in_progress)]
            except UserError as error:
                found = [error]
        broadcast_object_list(found)
        if isinstance(found[0], UserError):
            raise found[0]
        return list(found[0])

    def _chosen(self, stage: int, model: nn.Module, in_progress: bool) -> Sequence[str]:
        if self._pipeline is None:
            self._open(model)
        assert self._pipeline is not None
        (arm,) = self._pipeline.space.arms.values()
        return self._pipeline.select_stage(arm, stage, model, in_progress)

    def _open(self, model: nn.Module) -> None:
        """Begin the run that chooses: collect, unless training goes on."""
        arguments: GRPOConfig = self.args
        name = str(getattr(model.config, "_name_or_path", "") or "model")
        train = self.train_dataset
        config = make_config(self._selector, self._folder, train, arguments, name, self.steps_per_stage)
        given = Given(Policy(model, self.processing_class), self._identity, self._judge, arguments)
        pipeline = self._pipeline = Pipeline(config, given)
        (arm,) = pipeline.space.arms.values()
        kept = [row for row in read_jsonl(arm.rewards) if row["step"] < self.state.global_step]
        if arm.rewards.is_file():  # what an interrupted attempt wrote beyond the checkpoint
            write_text(arm.rewards, "".join(json.dumps(row) + "\n" for row in kept))
        if not self.state.global_step:
            pipeline.collect()
        elif not is_finished(pipeline.space.trajectories):
            raise ArtifactError(
                "training goes on from a checkpoint, and the trajectories of the policy before it are gone",
                where=str(pipeline.space.trajectories),
                fix="restore the folder, or start anew.",
            )

    def _judge(self, rows: Sequence[Answered]) -> list[Judgement]:
        """Verdicts by the reward function that says what is right, on the rows of the datasets that were given."""
        sets = {"train": self.train_dataset}
        sets |= {f"validation/{name}": dataset for name, dataset in self._selector.validation_sets.items()}
        found: list[Judgement | None] = [None] * len(rows)
        by_set: dict[str, list[tuple[int, int]]] = {}
        for place, row in enumerate(rows):
            origin = json.loads(row.extra)
            by_set.setdefault(origin["set"], []).append((place, origin["row"]))
        for name, places in by_set.items():  # columns differ from set to set
            columns: dict[str, list[Any]] = {}
            for _, number in places:
                for key, value in sets[name][number].items():
                    columns.setdefault(key, []).append(value)
            prompts = columns.pop("prompt")
            texts = [rows[place].completion for place, _ in places]
            completions = [
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for text, prompt in zip(texts, prompts, strict=True)
            ]
            values = self._call_success(prompts, completions, texts, columns)
            for (place, _), value in zip(places, values, strict=True):
                found[place] = Judgement(self._verdict(value), 0.0)
        return [judgement for judgement in found if judgement is not None]

    def _call_success(
        self, prompts: list[Any], completions: list[Any], texts: list[str], columns: Mapping[str, list[Any]]
    ) -> Sequence[float | None]:
        result = self._success[1](
            prompts=prompts,
            completions=completions,
            completion_ids=self.processing_class(text=texts)["input_ids"],
            trainer_state=self.state,
            log_extra=lambda *_: None,
            log_metric=lambda *_: None,
            **columns,
        )
        values = asyncio.run(result) if inspect.iscoroutine(result) else result
        if len(values) != len(texts):
            raise ConfigError(
                f"it returned {len(values)} rewards for {len(texts)} completions",
                where=f"reward function {self._success[0]}",
                fix="return one for each.",
            )
        return list(values)

    def _verdict(self, value: float | None) -> str:
        if value is None or math.isnan(value):
            return UNPARSEABLE_GOLD
        return CORRECT if value >= self._selector.threshold else WRONG

    # -- recording -------------------------------------------------------------------------------------------------

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.model.training:
            self._record(rewards_per_func, inputs, prompts, completions, completion_ids_list)
        return rewards_per_func

    def _record(
        self,
        rewards_per_func: Tensor,
        inputs: Sequence[Mapping[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        ids: Sequence[Sequence[int]],
    ) -> None:
        """What the next selection learns of training: who was right."""
        place = self.reward_func_names.index(self._success[0]) if self._success[2] else None
        if place is not None:
            known = rewards_per_func[:, place].tolist()
        else:
            texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
            columns = {key: [row[key] for row in inputs] for key in inputs[0] if key != "prompt"}
            known = gather_object(list(self._call_success(prompts, completions, texts, columns)))
        seen = gather_object([row[PROMPT_ID] for row in inputs])
        tokens = sum(gather_object([len(one) for one in ids]))
        if self._pipeline is None:
            return
        (arm,) = self._pipeline.space.arms.values()
        verdicts = [self._verdict(value) for value in known]
        row = {
            "step": self.state.global_step,
            "prompt_ids": seen,
            "rewards": [reward(verdict) for verdict in verdicts],
            "verdicts": dict(sorted(Counter(verdicts).items())),
            "tokens": tokens,
        }
        append_jsonl(arm.rewards, row)


class _StageStart(TrainerCallback):
    """Chooses the prompts of a stage when its epoch begins."""

    def __init__(self, trainer: CurriculumTrainer) -> None:
        self._trainer = trainer
        self._stages = Stages(trainer.choose, trainer._positions, trainer)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stages = Stages(self._trainer.choose, self._trainer._positions, self._trainer)
        if self._trainer.accelerator.is_main_process:
            stages, steps = self._trainer._selector.stages, self._trainer.steps_per_stage
            say(f"curriculum: {stages} stages of {steps} steps, in {self._trainer._folder}")

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stages.begin(state.global_step)


def _success(
    selector: Selector, functions: Sequence[Any], names: Sequence[str]
) -> tuple[str, Callable[..., Any], bool]:
    """(name, function, whether it is one of the trainer's) of what says that a completion is right."""
    chosen = selector.success
    if callable(chosen):
        return getattr(chosen, "__name__", "success"), chosen, False
    if isinstance(chosen, str) and chosen in names:
        chosen = list(names).index(chosen)
    if not isinstance(chosen, int) or not 0 <= chosen < len(functions):
        raise ConfigError(
            f"there is no reward function {chosen!r}",
            where="Selector.success",
            fix=f"name one of {', '.join(names)}, its place, or give a function.",
        )
    if isinstance(functions[chosen], nn.Module):
        raise ConfigError(
            f"{names[chosen]} is a reward model, which does not say whether a completion is right",
            where="Selector.success",
            fix="name a reward function, or give one.",
        )
    return names[chosen], functions[chosen], True


def _identity(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and first bytes of all weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        head = weight.detach().flatten()[: HASHED_BYTES // max(1, weight.element_size())].contiguous().cpu()
        digest.update(head.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
