"""For a TRL script: GRPOTrainer on prompts that a curriculum chooses batch by batch, and verifiers as its rewards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from cropi.console import say
from cropi.errors import ConfigError
from cropi.exchange.rewards import Rewards
from cropi.parallel import joined_ranks, process_group
from cropi.policy import Policy
from cropi.run_folder import discard, require_script_folder
from cropi.stages.online_loop import ChooserLoop
from cropi.stages.online_trainer import ReadsInfluence, StepRecord
from cropi.stages.run import Run, Setup
from cropi.stages.validation_pass import Answer
from cropi.training.grpo_settings import save_between_batches, warn_of_other_terms
from cropi.training.reward_log import Judged, RewardLog
from cropi.training.sharding import gathered
from cropi.trl.messages import worded
from cropi.trl.script_run import ChosenRows, ScriptRun, encoded_by
from cropi.trl.selector import PROMPT_ID, Selector, make_config, pool_of

PAIR = 2  # completions of a validation prompt come in pairs, for two halves


class CurriculumTrainer(ReadsInfluence):
    """`GRPOTrainer` with one more argument, `selector`. All others are TRL's and mean the same.

    Of TRL it overrides `_calculate_rewards`, to see the rewards. `curriculum` tells what is known of the prompts, from
    the start of `train`.
    """

    curriculum: ScriptRun
    loop: ChooserLoop
    num_generations_eval: int
    train_dataset: Any
    _judged: tuple[Sequence[Mapping[str, Any]], Judged]  # the rows judged last

    def __init__(self, *args: Any, selector: Selector, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self.args, "use_transformers_continuous_batching", False):
            raise ConfigError(
                "TRL ends it in training mode, so that an evaluation cannot be told from training",
                where="args.use_transformers_continuous_batching",
                fix="leave it out, or set use_vllm.",
            )
        self.selector, self.pool = selector, pool_of(self.train_dataset)
        if self.args.remove_unused_columns:  # TRL would drop the ids
            kept = {"prompt", "image", "images", PROMPT_ID} & set(self.pool.column_names)
            self.pool, self.args.remove_unused_columns = self.pool.select_columns(sorted(kept)), False
        self.shuffle_dataset = False  # the order is that of choice; a loader's workers would choose by old evidence
        self.args.dataloader_num_workers, self.args.dataloader_prefetch_factor = 0, None
        self.args.dataloader_persistent_workers = False
        # transformers uploads the output folder, except names that begin with an underscore
        self.folder = Path(selector.folder or Path(self.args.output_dir) / "_curriculum")
        self.reward_log = RewardLog(self.folder / "run" / "rewards.jsonl")
        self.add_callback(_Curriculum(self, self.folder / "run"))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as in TRL; the curriculum's folder stays locked meanwhile."""
        found = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        checkpoint, prompts = Path(found) if found else None, self.args.generation_batch_size // self.num_generations
        with joined_ranks(), worded(), ExitStack() as stack:
            if self.selector.folder is not None:
                process_group().from_main(partial(require_script_folder, self.folder))
            steps = self._total_steps(prompts)
            save_between_batches(self.args, steps)
            model = self.accelerator.unwrap_model(self.model)
            config = make_config(self.selector, self.folder, self.pool, self.args, model, steps)
            tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
            encode = partial(encoded_by, self)
            if config.select.strategy.reads_influence:
                if self.args.torch_compile:  # the wrapper is not the model that layers are read of
                    raise ConfigError(
                        "influence cannot be read from a compiled model",
                        where="args.torch_compile",
                        fix="leave it out, or name a strategy that learns from rewards alone.",
                    )
                warn_of_other_terms(self.args)
            if checkpoint is None:
                process_group().from_main(partial(discard, config.folder))
            run = Run(config, Setup(Policy(model, tokenizer), config.policy.path, _by_the_trainer, self.args, encode))
            if process_group().is_main:
                stack.callback(run.folder.unlock)
            self.curriculum = ScriptRun(run, self)
            self.online = self.loop = self.curriculum.loop(self, checkpoint)
            self.train_dataset = ChosenRows(self.pool, self.loop.sampler, prompts)
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _total_steps(self, prompts: int) -> int:
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        served = self.args.steps_per_generation * self.num_iterations / self.args.gradient_accumulation_steps
        return max(1, round(self.args.num_train_epochs * (len(self.pool) // prompts) * served))

    @contextmanager
    def plain_model(self) -> Iterator[nn.Module]:
        """The policy as it trains, with whole weights under ZeRO-3."""
        with gathered(self):
            yield self.accelerator.unwrap_model(self.model)

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        totals = (rewards * self.reward_weights.to(rewards.device)).nansum(1).tolist()
        missing = rewards.isnan().all(1).tolist()
        known = [total if isfinite(total) and not none else None for total, none in zip(totals, missing, strict=True)]
        start = self.accelerator.process_index * len(inputs)
        ids = [str(row.get(PROMPT_ID, "")) for row in inputs]
        judged = Judged(ids, completion_ids_list, known[start : start + len(inputs)], [])
        self._judged = inputs, judged
        if self.model.training and self.online is not None:
            tokens = sum(len(self.curriculum.prompt_tokens[prompt_id]) for prompt_id in ids)
            self.reward_log.record(judged, self.state.global_step, tokens)
        return rewards

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's; what an evaluation of the user's has sampled is kept for the curriculum."""
        if self.online is not None and not model.training:
            self.curriculum.evaluated(self._judged[0], self._answers(inputs), self.state.global_step)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def answered(self, rows: Sequence[Mapping[str, Any]], seed: int) -> list[Answer]:
        """Sample and judge rows, which come in pairs, as an evaluation does. Training notices nothing of it."""
        most = self.args.per_device_train_batch_size * self.args.steps_per_generation // PAIR * PAIR or PAIR
        metrics, number = self._metrics["eval"], self.num_generations_eval
        self._metrics["eval"], self.num_generations_eval = defaultdict(list), PAIR
        self.model.eval()
        found: list[Answer] = []
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                for start in range(0, len(rows), most):
                    batch = [dict(row) for row in rows[start : start + most]]
                    found += self._answers(self._generate_and_score_completions(batch))
            return found
        finally:
            self.model.train()
            self._metrics["eval"], self.num_generations_eval = metrics, number

    def _answers(self, sampled: Mapping[str, Any]) -> list[Answer]:
        """The rows that were judged last, with the tokens of their prompts and of tools."""
        judged, prompts = self._judged[1], zip(sampled["prompt_ids"], sampled["prompt_mask"].bool(), strict=True)
        written = sampled.get("tool_mask", torch.ones_like(sampled["completion_ids"])).tolist()
        return [
            Answer(prompt[kept].tolist(), ids, mask[: len(ids)], reward)
            for (prompt, kept), ids, mask, reward in zip(
                prompts, judged.completion_ids, written, judged.rewards, strict=True
            )
        ]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the curriculum's numbers beside those of training."""
        own = self.curriculum.metrics() if self.online is not None and "loss" in logs else {}
        super().log(logs | own, start_time)


class _Curriculum(StepRecord):
    """Renews directions, keeps the state in checkpoints, and records steps."""

    _trainer: CurriculumTrainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        super().on_train_begin(args, state, control)
        if process_group().is_main:
            self._trainer.reward_log.forget_from(state.global_step)
        pool, folder = len(self._trainer.pool), self._trainer.folder
        say(f"curriculum: each batch is chosen from {pool:,} prompts, in {folder}")

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:  # before the loader asks for the first batch
            self._trainer.loop.renew_directions(0)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step and self._trainer.is_between_batches:
            self._trainer.loop.renew_directions(state.global_step)
        super().on_step_begin(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if process_group().is_main:
            self._trainer.loop.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._trainer.loop.end_stage(0)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.loop.end_stage(0)
        say(self._trainer.curriculum.closing_line(Path(self._trainer.selector.folder or args.output_dir)))


def _by_the_trainer(rows: Sequence[Any]) -> list[Any]:
    raise AssertionError("the trainer's reward functions judge")


class Verified:
    """A verifier as a TRL reward function: 1 or 0, and None for an unreadable gold answer.

    Verifiers run in processes that can be killed. With `graded=True`, a verifier that scores returns its scores.

        GRPOTrainer(..., reward_funcs=Verified("math"))
        Verified("exact", marker="answer", verification={"processes": 8})

    Gold answers come from the column `answer`, else `solution`; `source`, `extra_info` and `metadata` are passed to
    verifiers that need them. Raises ConfigError for an unknown verifier or setting, DataError for rows without an
    answer.
    """

    def __init__(self, kind: str, *, verification: dict[str, Any] | None = None, **settings: Any) -> None:
        with worded():
            self._rewards = Rewards({"type": kind, **settings}, verification, where="Verified")
        self.__name__ = kind

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        with worded():
            return self._rewards.trl(completions, **columns)
