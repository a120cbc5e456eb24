"""TRL's GRPOTrainer, trained on prompts that a curriculum chooses batch by batch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from cropi.console import say
from cropi.errors import ArtifactError, ConfigError, UserError
from cropi.parallel import joined_ranks, process_group
from cropi.policy import Policy
from cropi.rewards.verdicts import Answered, Judgement
from cropi.stages.run import Run, Setup
from cropi.streams import append_jsonl, cut_jsonl
from cropi.training.grpo_settings import save_between_batches
from cropi.training.online_trainer import ReadsInfluence
from cropi.training.reward_log import Judged, RewardLog
from cropi.training.sharding import gathered
from cropi.trl.messages import worded
from cropi.trl.script_run import PAIR, Answer, ScriptRun, encoded_by
from cropi.trl.selector import PROMPT_ID, Selector, make_config, pool_of


class CurriculumTrainer(ReadsInfluence):
    """`GRPOTrainer` with one more argument, `selector`. All others are TRL's and mean the same.

    Of TRL it overrides what `ReadsInfluence` does, and `_calculate_rewards` to see the rewards. `curriculum` tells
    what is known of the prompts, from the start of `train`.
    """

    curriculum: ScriptRun
    reward_log: RewardLog
    train_dataset: Any
    num_generations_eval: int
    _judged: Judged  # the rows judged last

    def __init__(self, *args: Any, selector: Selector, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._selector, self.train_dataset = selector, pool_of(self.train_dataset)
        if self.args.remove_unused_columns:  # TRL would drop the ids
            kept = {"prompt", "image", "images", PROMPT_ID} & set(self.train_dataset.column_names)
            self.train_dataset, self.args.remove_unused_columns = self.train_dataset.select_columns(sorted(kept)), False
        # transformers uploads the output folder, except names that begin with an underscore
        self._folder = Path(selector.folder or Path(self.args.output_dir) / "_curriculum")
        self.reward_log = RewardLog(self._folder / "run" / "rewards.jsonl")
        self.add_callback(_Curriculum(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as in TRL; the curriculum's folder stays locked meanwhile."""
        found = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        run: Run | None = None
        with joined_ranks(), worded():
            try:
                save_between_batches(self.args, self._total_steps())
                run = self._opened()
                self.curriculum = ScriptRun(run, self.train_dataset, self._selector.validation_sets, self)
                self.online = self.curriculum.begin(self, Path(found) if found else None)
                return super().train(resume_from_checkpoint, *args, **kwargs)
            except UserError as error:
                raise error.with_traceback(None) from None  # without the frames that are not the script's
            finally:
                if run is not None and process_group().is_main:
                    run.folder.unlock()

    def _opened(self) -> Run:
        model = self.accelerator.unwrap_model(self.model)
        validation = {f"validation/{name}": rows for name, rows in self._selector.validation_sets.items()}
        encode = partial(encoded_by, self, {"train": self.train_dataset} | validation)
        config = make_config(self._selector, self._folder, self.train_dataset, self.args, model, self._total_steps())
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        try:
            return Run(config, Setup(Policy(model, tokenizer), config.policy.path, _by_the_trainer, self.args, encode))
        except (ArtifactError, ConfigError) as error:
            raise type(error)(
                error.what, where=error.where, fix=f"delete {self._folder}, or give Selector(folder=...)."
            ) from None

    def _total_steps(self) -> int:
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        per_step = self.args.generation_batch_size // self.num_generations  # prompts of a generation batch
        served = self.args.steps_per_generation * self.num_iterations / self.args.gradient_accumulation_steps
        return max(1, round(self.args.num_train_epochs * (len(self.train_dataset) // per_step) * served))

    @contextmanager
    def plain_model(self) -> Iterator[nn.Module]:
        """The policy as it trains, with whole weights under ZeRO-3."""
        with gathered(self):
            yield self.accelerator.unwrap_model(self.model)

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        totals = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        judged = (~rewards.isnan().all(1)).tolist()
        known = [value if given else None for value, given in zip(totals.tolist(), judged, strict=True)]
        start = self.accelerator.process_index * len(inputs)
        ids = [str(row.get(PROMPT_ID, "")) for row in inputs]
        self._judged = Judged(ids, [], completion_ids_list, known[start : start + len(inputs)], [])
        if self.model.training and self.online is not None:
            tokens = sum(len(self.curriculum.prompt_tokens[prompt_id]) for prompt_id in ids)
            self.reward_log.record(self._judged, self.state.global_step, tokens)
        return rewards

    def answered(self, rows: Sequence[Mapping[str, Any]], seed: int) -> list[Answer]:
        """Sample and judge rows, which come in pairs, as an evaluation does. Training notices nothing of it."""
        most = self.args.per_device_train_batch_size * self.args.steps_per_generation // PAIR * PAIR or PAIR
        metrics, number = self._metrics["eval"], self.num_generations_eval
        self._metrics["eval"], self.num_generations_eval = defaultdict(list), PAIR
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        self.model.eval()
        try:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                return [a for start in range(0, len(rows), most) for a in self._answers(rows[start : start + most])]
        finally:
            self.model.train()
            self._metrics["eval"], self.num_generations_eval = metrics, number

    def _answers(self, rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
        found = self._generate_and_score_completions([dict(row) for row in rows])
        prompts = zip(found["prompt_ids"].tolist(), found["prompt_mask"].tolist(), strict=True)
        tokens = [[t for t, kept in zip(ids, mask, strict=True) if kept] for ids, mask in prompts]
        written = (
            found["tool_mask"].tolist() if "tool_mask" in found else [[1] * len(ids) for ids in found["completion_ids"]]
        )
        return [
            Answer(prompt, completion, mask[: len(completion)], reward, "pixel_values" in found)
            for prompt, completion, mask, reward in zip(
                tokens, self._judged.completion_ids, written, self._judged.rewards, strict=True
            )
        ]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the curriculum's numbers beside those of training."""
        own = self.curriculum.metrics() if self.online is not None and "loss" in logs else {}
        super().log(logs | own, start_time)


class _Curriculum(TrainerCallback):
    """Renews directions, keeps the state in checkpoints, and records what training did."""

    def __init__(self, trainer: CurriculumTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self._trainer
        # TRL counts micro-steps from 0 after a resume, which would shift its generation batches
        trainer._step = trainer._micro_steps = state.global_step * args.gradient_accumulation_steps
        trainer.reward_log.forget_from(state.global_step)
        if process_group().is_main:
            for name in ("steps.jsonl", "metrics.jsonl"):
                cut_jsonl(trainer._folder / "run" / name, lambda row: row["step"] <= state.global_step)
            say(f"curriculum: each batch is chosen from {len(trainer.train_dataset):,} prompts, in {trainer._folder}")

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:
            self._renew(0)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        repeats = self._trainer.args.steps_per_generation * self._trainer.num_iterations
        if state.global_step and self._trainer._micro_steps % repeats == 0:
            self._renew(state.global_step)
        self._began = time.perf_counter()

    def _renew(self, step: int) -> None:
        if self._trainer.online is not None:
            self._trainer.online.renew_directions(step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        ranks, online = process_group(), self._trainer.online
        read = 0.0 if online is None else online.read_passes()
        line = {"step": state.global_step, "seconds": (time.perf_counter() - self._began) * ranks.size}
        line |= {"read_passes": read} if read else {}
        self._note("steps.jsonl", line | ranks.facts())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        finite = {k: v for k, v in kwargs["logs"].items() if isinstance(v, int | float) and abs(v) < float("inf")}
        self._note("metrics.jsonl", finite | {"step": state.global_step})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        loop = self._trainer.online
        if loop is not None:
            if process_group().is_main:
                loop.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            loop.end_stage(0)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._trainer.online is not None:
            self._trainer.online.end_stage(0)
            if process_group().is_main:
                trainer = self._trainer
                place = trainer._folder if trainer._selector.folder else Path(args.output_dir)
                say(trainer.curriculum.closing_line(place))

    def _note(self, name: str, line: Mapping[str, Any]) -> None:
        if process_group().is_main:
            append_jsonl(self._trainer._folder / "run" / name, line)


def _by_the_trainer(rows: Sequence[Answered]) -> list[Judgement]:
    raise AssertionError("the trainer's reward functions judge")
