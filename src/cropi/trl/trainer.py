"""TRL's GRPOTrainer, trained on the prompts that a selector chooses for each stage."""

from __future__ import annotations

import inspect
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from cropi.artifacts import is_finished
from cropi.console import say, warn
from cropi.errors import ArtifactError, ConfigError, PolicyError, SignalError, UserError
from cropi.functional.surrogate import NORMALIZER_OF_LOSS
from cropi.pipeline import select_stage
from cropi.policy import Policy, weights_identity
from cropi.rewards.verdicts import Answered, Judgement
from cropi.stages.collect import collect
from cropi.stages.run import Run, Setup
from cropi.streams import append_jsonl, cut_jsonl
from cropi.training.sharding import gathered, refused_of_zero3
from cropi.training.stage_trainer import Staged, Stages
from cropi.trl.messages import worded
from cropi.trl.reward_function import Success
from cropi.trl.selector import PROMPT_ID, Selector, are_chat, make_config, prompt_ids


class CurriculumTrainer(Staged):
    """`GRPOTrainer` with one more argument, `selector`. All others are TRL's and mean the same.

    Training takes as many steps as without a selector (`max_steps`, or `num_train_epochs` over the whole set), divided
    into at most `selector.stages` equal stages of whole generation batches. An epoch is a stage. Reward functions,
    PEFT, callbacks, logging, saving and `train(resume_from_checkpoint=...)` work as in TRL. With several processes the
    first one chooses and the others wait (`args.ddp_timeout` must allow for that).

    Raises ConfigError for arguments that cannot be combined with a curriculum (`_refused` lists them), and the errors
    of `Selector` and its settings.
    """

    def __init__(self, *args: Any, selector: Selector, **kwargs: Any) -> None:
        bound = inspect.signature(GRPOTrainer.__init__).bind_partial(None, *args, **kwargs).arguments
        dataset = bound.get("train_dataset")
        if not isinstance(dataset, Dataset):
            raise ConfigError(
                f"the training set is a {type(dataset).__name__}, but prompts are chosen by their index",
                where="train_dataset",
                fix="pass a datasets.Dataset, e.g. Dataset.from_list(list(stream)).",
            )
        ids = prompt_ids(dataset, "train_dataset")
        marked = dataset if PROMPT_ID in dataset.column_names else dataset.add_column(PROMPT_ID, ids)
        bound = {name: value for name, value in bound.items() if name != "self"} | {"train_dataset": marked}
        more = bound.pop("kwargs", {})
        super().__init__(**bound, **more)
        self._selector, self._positions = selector, {prompt_id: row for row, prompt_id in enumerate(ids)}
        self._success = Success.of(selector, self.reward_funcs, self.reward_func_names)
        self._check(dataset)
        self._chat = self._asks_in_chat(dataset)
        self.stages, self.steps_per_stage = self._stages()
        self.args.max_steps = self.stages * self.steps_per_stage
        # transformers uploads the output folder, except names that begin with an underscore
        self._folder = Path(selector.folder or Path(self.args.output_dir) / "_curriculum")
        self._run: Run | None = None
        self.add_callback(_StageStart(self))

    def _check(self, dataset: Dataset) -> None:
        for refused, what, where, fix in self._refused(dataset):
            if refused:
                raise ConfigError(what, where=where, fix=fix)
        arguments = self.args
        plain = arguments.top_p == 1.0 and arguments.repetition_penalty == 1.0
        if not plain or arguments.top_k or arguments.min_p or arguments.generation_kwargs:
            warn("selection samples without top_p, top_k, min_p, repetition_penalty and generation_kwargs")

    def _asks_in_chat(self, dataset: Dataset) -> bool:
        """Whether prompts are chat messages. Raises PolicyError if the tokenizer cannot format them."""
        sets = {"train": dataset} | {f"validation/{n}": rows for n, rows in self._selector.validation_sets.items()}
        chat = are_chat({self._selector.places[name]: rows for name, rows in sets.items()})
        if chat and not getattr(self.processing_class, "chat_template", None):
            raise PolicyError(
                "the prompts are chat messages, but the tokenizer has no chat template",
                where="processing_class",
                fix="pass a tokenizer with a chat template (or set chat_template), or write the prompts as text.",
            )
        return chat

    def _refused(self, dataset: Dataset) -> list[tuple[Any, str, str, str]]:
        """List what is unsupported as (present, problem, where, fix)."""
        arguments = self.args
        return [
            *refused_of_zero3(self),
            (
                self.is_fsdp_enabled,
                "the weights are sharded, but the process that chooses needs all of them",
                "args.fsdp",
                "train with plain data parallelism, or choose beforehand with `cropi select`.",
            ),
            (
                self.tools or self.rollout_func or self.environment_factories,
                "selection samples from the policy alone",
                "tools, rollout_func or environment_factory",
                "leave it out, or choose beforehand with `cropi select`.",
            ),
            (
                self._is_vlm or {"image", "images"} & set(dataset.column_names),
                "prompts are chosen by their text alone",
                "images",
                "leave them out.",
            ),
            (
                arguments.loss_type not in NORMALIZER_OF_LOSS,
                f"no per-prompt normaliser is known for the loss {arguments.loss_type!r}",
                "args.loss_type",
                f"use one of {', '.join(NORMALIZER_OF_LOSS)}.",
            ),
            (
                self.chat_template_kwargs,
                "selection encodes prompts with the template's defaults",
                "args.chat_template_kwargs",
                "put them into the template, or leave them out.",
            ),
            (
                getattr(arguments, "cast_lm_head_to_fp32", False),
                "influence is computed in the precision of the weights",
                "args.cast_lm_head_to_fp32",
                "leave it out.",
            ),
            (
                arguments.ignore_data_skip,
                "a resumed training would repeat batches of a stage and shift the ends of stages",
                "args.ignore_data_skip",
                "leave it out.",
            ),
            (self._selector.stages < 1, "a curriculum needs stages", "Selector.stages", "set it to 1 or more."),
        ]

    def _stages(self) -> tuple[int, int]:
        """Return the number of stages and the optimiser steps of each.

        Stages consist of whole generation batches, so the total may exceed the requested steps slightly. There are
        fewer stages if there are too few generation batches.
        """
        arguments = self.args
        serves = arguments.steps_per_generation * self.num_iterations  # micro-steps of a generation batch
        accumulated = arguments.gradient_accumulation_steps
        if arguments.max_steps > 0:
            total = float(arguments.max_steps)
        else:
            batches = len(self._positions) // (arguments.generation_batch_size // self.num_generations)
            total = arguments.num_train_epochs * batches * serves / accumulated
        unit = serves // math.gcd(serves, accumulated)
        units = max(1, math.ceil(total / unit))
        each = math.ceil(units / min(self._selector.stages, units))
        stages = math.ceil(units / each)
        taken = stages * each * unit
        if taken > 1.05 * total:
            warn(f"{stages} stages of {each * unit} steps are {taken} steps instead of the requested {total:g}")
        return stages, each * unit

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as in TRL; the curriculum's folder stays locked meanwhile."""
        with gathered(self):
            weights = weights_identity(self.accelerator.unwrap_model(self.model))
        self._identity = f"{weights} {self._success.identity}"
        try:
            return super().train(*args, **kwargs)
        except UserError as error:
            raise error.with_traceback(None) from None  # without the frames that are not the script's
        finally:
            if self._run is not None:
                self._run.folder.unlock()
                self._run = None

    # -- choosing --------------------------------------------------------------------------------------------------

    def choose(self, stage: int, model: nn.Module, in_progress: bool) -> Sequence[str]:
        """Return the prompt ids of a stage: the first process chooses and broadcasts them."""
        found: list[Any] = [None]
        failed: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                with worded():
                    found = [self._chosen(stage, model, in_progress)]
            except Exception as error:  # the other processes wait for any result
                failed, found = error, [error if isinstance(error, UserError) else PolicyError(repr(error))]
        broadcast_object_list(found)
        if failed is not None:
            raise failed
        if isinstance(found[0], UserError):
            raise found[0]
        return list(found[0])

    def _chosen(self, stage: int, model: nn.Module, in_progress: bool) -> Sequence[str]:
        try:
            if self._run is None:
                self._open(model)
            assert self._run is not None
            return select_stage(self._run, stage, model, in_progress)
        except SignalError as error:
            raise SignalError(
                f"{error.what}; {self._success.facts}",
                where=error.where,
                fix=f"{error.fix} Or give Selector(success=...) the function that says whether a completion is right, "
                f"or another threshold; delete {self._folder} if these change.",
            ) from None

    def _open(self, model: nn.Module) -> None:
        """Start or resume the run that chooses."""
        name = str(getattr(model.config, "_name_or_path", "") or "model")
        shape = self._chat, self.stages, self.steps_per_stage
        config = make_config(self._selector, self._folder, self.train_dataset, self.args, name, *shape)
        setup = Setup(Policy(model, self.processing_class), self._identity, self._judge, self.args)
        try:
            self._begin(Run(config, setup))
        except (ArtifactError, ConfigError) as error:
            raise type(error)(
                error.what,
                where=error.where,
                fix=f"to choose anew, delete {self._folder} or give Selector(folder=...); to go on, leave the script "
                "as it was when training began.",
            ) from None

    def _begin(self, run: Run) -> None:
        self._run = run
        if self.state.global_step:
            if not is_finished(run.folder.trajectories):
                raise ArtifactError(
                    "training resumes from a checkpoint, but the trajectories of the policy before it are gone",
                    where=str(run.folder.trajectories),
                )
            # lines that an interrupted attempt wrote after the checkpoint
            cut_jsonl(run.paths.rewards, lambda row: row["step"] < self.state.global_step)
            return
        run.paths.forget_training()
        collect(run)

    def _judge(self, rows: Sequence[Answered]) -> list[Judgement]:
        """Judge completions with the success function, on the original rows of the datasets."""
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
            ids = self.processing_class(text=texts, add_special_tokens=False)["input_ids"]
            for (place, _), judgement in zip(places, self._judged(prompts, completions, ids, columns), strict=True):
                found[place] = judgement
        return [judgement for judgement in found if judgement is not None]

    def _judged(
        self, prompts: list[Any], completions: list[Any], ids: Sequence[Any], columns: Mapping[str, list[Any]]
    ) -> list[Judgement]:
        loop = getattr(self, "async_loop", None)  # TRL's, where it has one
        return self._success(prompts, completions, ids, columns, self.state, loop)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        kept: list[str] = self._signature_columns  # type: ignore[has-type]
        self._signature_columns = kept if PROMPT_ID in kept else [*kept, PROMPT_ID]

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
        """Log which completions of a batch were right, for the next selection."""
        if self._success.place is not None:
            judged = [self._success.judged(value) for value in rewards_per_func[:, self._success.place].tolist()]
        else:
            columns = {key: [row[key] for row in inputs] for key in inputs[0]}
            judged = gather_object(self._judged(prompts, completions, ids, columns))
        seen = gather_object([str(row[PROMPT_ID]) for row in inputs])
        tokens = sum(gather_object([len(one) for one in ids]))
        if self._run is None:
            return
        row = {
            "step": self.state.global_step,
            "prompt_ids": seen,
            "rewards": [judgement.reward for judgement in judged],
            "verdicts": dict(sorted(Counter(judgement.verdict for judgement in judged).items())),
            "tokens": tokens,
        }
        append_jsonl(self._run.paths.rewards, row)


class _StageStart(TrainerCallback):
    """Choose the prompts of a stage when its epoch begins."""

    def __init__(self, trainer: CurriculumTrainer) -> None:
        self._trainer = trainer
        self._stages = Stages(trainer.choose, trainer._positions, trainer)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stages = Stages(self._trainer.choose, self._trainer._positions, self._trainer)
        # TRL counts micro-steps from 0 after a resume, which would shift its generation batches
        self._trainer._step = state.global_step * args.gradient_accumulation_steps
        if self._trainer.accelerator.is_main_process:
            stages, steps = self._trainer.stages, self._trainer.steps_per_stage
            say(f"curriculum: {stages} stages of {steps} steps, in {self._trainer._folder}")

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stages.begin(state.global_step)
