"""`train`: one `GRPOTrainer.train()` for all stages of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig

from cropi.artifacts import USABLE, corrupt, finish, is_finished, open_artifact, read_manifest
from cropi.config import Config
from cropi.console import Progress, progress, warn
from cropi.errors import ArtifactError, ConfigError, SignalError
from cropi.parallel import process_group
from cropi.policy import Policy, load_policy
from cropi.prompts.encoding import encode_prompts, trainer_prompts
from cropi.run_folder import checkpoints
from cropi.run_tables import evaluation_files, forget_evaluations
from cropi.stages.evaluate import evaluate, evaluate_base, is_evaluated
from cropi.stages.online import OnlineRun
from cropi.stages.online_loop import ChooserLoop
from cropi.stages.online_trainer import OnlineTrainer, StepRecord
from cropi.stages.run import Run
from cropi.training.dynamic_sampling import DynamicSampling
from cropi.training.grpo_settings import grpo_config
from cropi.training.reward_log import RecordedReward
from cropi.training.sharding import check_sharding, resuming
from cropi.training.stage_trainer import SelectStage, Stages

CHECKPOINT = "checkpoint"  # kind of artifact
MADE_BY = "cropi train"
Evaluate = Callable[[int, nn.Module], None]  # (optimiser step, model)


def train(run: Run, select_stage: SelectStage) -> Path:
    """Train all stages, evaluating on schedule from the base policy on; returns the last checkpoint."""
    evaluate_base(run)
    settings = grpo_config(run.config, run.paths.checkpoints, run.setup.policy.device, process_group().size)
    process_group().from_main(lambda: _require_evaluations(run, _newest_step(run)))
    policy = load_policy(run.config.policy, dtype=run.config.policy.trained_in)
    rows, reward = _training_rows(run), RecordedReward(run.judge, run.paths.rewards)
    online = OnlineRun(run, rows, reward).loop if run.config.select.strategy.chooses_online else None
    task = TrainTask(
        config=run.config,
        rows=rows,
        settings=settings,
        reward=reward,
        online=online,
        select_stage=select_stage,
        evaluate=lambda step, model: evaluate(run, model, step),
        evaluated=lambda step: is_evaluated(run, step),
        folder=run.paths.folder,
        made_by=run.folder.settings(),
    )
    done = process_group().from_main(lambda: _newest_step(run))
    _evaluate_missing(run, done - 1)  # while their checkpoints are there
    final = train_stages(task, policy)
    _evaluate_missing(run, run.config.train.steps)
    return final


def require_reached(run: Run, stage: int) -> None:
    """Refuse to select a stage that training has not reached: some strategies read its rewards."""
    reached = _newest_step(run) // run.config.train.steps_per_stage
    if stage > reached:
        raise ArtifactError(
            f"training has not come to stage {stage} yet, only to {reached}",
            where="--stage",
            fix="run `cropi train` first.",
        )


def _newest_step(run: Run) -> int:
    return newest_checkpoint(run.paths.checkpoints, run.config.train.steps)[1]


def _training_rows(run: Run) -> list[dict[str, Any]]:
    """Rows for TRL of the prompts that can be trained on."""
    tokenizer, prompts = run.setup.policy.tokenizer, run.folder.train_prompts
    usable = [row for row, status in zip(prompts.rows(), run.trajectories.statuses, strict=True) if status in USABLE]
    shown = trainer_prompts(tokenizer, run.config.prompts, usable)
    return [
        {"prompt": prompt, "prompt_json": row["messages"], "extra": row["extra"] or "", "prompt_tokens": len(ids)}
        | {name: row[name] for name in ("prompt_id", "answer", "source")}
        for row, prompt, ids in zip(usable, shown, encode_prompts(tokenizer, shown), strict=True)
    ]


def _evaluate_missing(run: Run, step: int) -> None:
    """Evaluate again up to a step, for tables that were damaged and deleted."""
    for at in process_group().from_main(lambda: _unevaluated(run, step)):
        checkpoint = open_checkpoint(run.paths.checkpoints / f"checkpoint-{at}")
        evaluate(run, load_policy(run.config.policy, str(checkpoint)).model, at)


def _unevaluated(run: Run, step: int) -> list[int]:
    """List the steps up to one that should have an evaluation and have none."""
    known, last = evaluation_files(run.paths.evaluations), run.config.train.steps
    wanted = [*range(run.config.evaluate_every, last, run.config.evaluate_every), last]
    return [at for at in wanted if at <= step and at not in known]


def _require_evaluations(run: Run, step: int) -> None:
    """Drop evaluations beyond the step that training goes on from, and require those before it."""
    folder = run.paths.evaluations
    forget_evaluations(folder, step)
    for at in _unevaluated(run, step):
        if not is_finished(run.paths.checkpoints / f"checkpoint-{at}"):
            raise ArtifactError(
                "is missing or not in its manifest, and the checkpoint of its step is gone",
                where=str(folder / f"step-{at:06}.parquet"),
                fix=f"put back a copy of {folder}, or start the run under another name.",
            )


@dataclass
class StageCallback(TrainerCallback):
    """Starts every stage with its selection, evaluates on schedule, and marks checkpoints as complete.

    At the end of a stage the checkpoint is saved before the evaluation, which may take long: an interruption must not
    cost the stage. A missed evaluation is made when training continues.
    """

    stages: Stages
    task: TrainTask
    bar: Progress
    trainer: OnlineTrainer
    _due: bool = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._due = self._is_scheduled(state) and not self.task.evaluated(state.global_step)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._evaluate_if_due(state)
        if self.trainer.online is not None and state.global_step == 0:
            self.trainer.online.renew_directions(0)
        self.stages.begin(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.trainer.online is not None and state.global_step < state.max_steps:
            self.trainer.online.renew_directions(state.global_step)
        if self.trainer.online is not None and state.global_step % self.trainer.steps_per_stage == 0:
            self.trainer.online.end_stage(state.global_step // self.trainer.steps_per_stage - 1)
        self.bar.advance()
        self._due = self._is_scheduled(state)
        if state.global_step % self.trainer.steps_per_stage:
            self._evaluate_if_due(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._evaluate_if_due(state)

    def _is_scheduled(self, state: TrainerState) -> bool:
        step = state.global_step
        return step > 0 and (step % self.task.config.evaluate_every == 0 or step == state.max_steps)

    def _evaluate_if_due(self, state: TrainerState) -> None:
        if self._due:
            self._due = False
            with self.trainer.plain_model() as model:
                self.task.evaluate(state.global_step, model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        process_group().barrier()  # each process writes its random state
        if process_group().is_main:
            self._finish(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step)
        self._evaluate_if_due(state)

    def _finish(self, checkpoint: Path, step: int) -> None:
        if self.trainer.online is not None:
            self.trainer.online.save(checkpoint)
        dynamic = self.trainer.dynamic
        details = {} if dynamic is None else {"drawn": dynamic.drawn}
        inputs = {"step": step, "settings": self.task.made_by}
        finish(checkpoint, CHECKPOINT, inputs=inputs, counts={}, details=details)
        keep, found = self.task.settings.save_total_limit, checkpoints(checkpoint.parent, step)
        for old in sorted(found)[: -keep if keep else 0]:
            shutil.rmtree(found[old])


@dataclass(frozen=True)
class TrainTask:
    """The rows, settings and callbacks of a training."""

    config: Config
    rows: Sequence[Mapping[str, Any]]  # prompt_id, prompt (as TRL takes it), answer
    settings: GRPOConfig
    reward: RecordedReward
    select_stage: SelectStage
    evaluate: Evaluate
    folder: Path
    online: Callable[[OnlineTrainer, Path | None], ChooserLoop] | None = None  # of a trainer at a checkpoint
    evaluated: Callable[[int], bool] = lambda step: False  # whether that step has been evaluated before
    made_by: Mapping[str, Any] = field(default_factory=dict)  # settings, for the manifests of checkpoints


def train_stages(task: TrainTask, policy: Policy) -> Path:
    """Train all stages, going on from the newest complete checkpoint; returns the last checkpoint.

    One `train()` call keeps the optimiser state, the learning-rate schedule, the step count and the KL reference (the
    initial policy) over all stages.
    """
    total, label = task.config.train.steps, task.config.select.label
    resume_from, done = _newest(task)
    if done == total and resume_from is not None:
        return resume_from
    process_group().from_main(lambda: _begin_from(task, resume_from, done))
    with progress(f"train {label}", total, "steps", done=done, stages=task.config.train.stages) as bar:
        trainer = _made_trainer(task, policy)
        check_sharding(trainer, task.config.policy.dtype, resume_from)
        position_of = {row["prompt_id"]: position for position, row in enumerate(task.rows)}
        stages = Stages(task.select_stage, position_of, trainer)
        trainer.add_callback(StepRecord(trainer, task.folder))  # before what comes between steps
        trainer.add_callback(StageCallback(stages, task, bar, trainer))
        trainer.dynamic = _dynamic_sampling(task, policy, resume_from)
        if task.online is not None:
            trainer.online = task.online(trainer, resume_from)
        trainer.remove_callback(PrinterCallback)  # this project has its own progress
        try:
            with resuming(trainer):
                trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            raise SignalError(
                "the policy has diverged: it gives no finite probabilities any more",
                where=f"run {label}",
                fix="lower trainer.learning_rate or set trainer.max_grad_norm, and start the run under another name.",
            ) from None
    finished, done = _newest(task)
    if finished is None or done != total:
        raise ArtifactError(
            f"training ended after {done} of {total} steps",
            where=str(task.folder),
            fix="run the same command again; if it ends there again, report it with the output of `cropi doctor`.",
        )
    return finished


def _dataset(rows: Sequence[Mapping[str, Any]]) -> datasets.Dataset:
    """Rows for TRL. Prompts are JSON in the table, which would give each chat message the keys of all, until used."""
    written = [dict(row) | {"prompt": json.dumps(row["prompt"])} for row in rows]
    return datasets.Dataset.from_list(written).with_transform(_read)


def _read(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return batch | {"prompt": [json.loads(prompt) for prompt in batch["prompt"]]}


def _made_trainer(task: TrainTask, policy: Policy) -> OnlineTrainer:
    try:
        return OnlineTrainer(
            model=policy.model,
            reward_funcs=task.reward,
            args=task.settings,
            train_dataset=_dataset(task.rows),
            processing_class=policy.tokenizer,
            steps_per_stage=task.config.train.steps_per_stage,
        )
    except Exception as error:  # many kinds, for settings that do not fit this policy or a Hub that is not to be had
        raise ConfigError(
            f"TRL makes no trainer of them for this policy: {' '.join(str(error).split())}",
            where="trainer",
            fix="correct the setting it names, or leave it out, and start the run under another name.",
        ) from None


def _newest(task: TrainTask) -> tuple[Path | None, int]:
    """Find the newest checkpoint, as rank 0 sees it. Rank 0 removes incomplete ones."""

    def find() -> tuple[str | None, int]:
        path, step = newest_checkpoint(Path(task.settings.output_dir), task.config.train.steps)
        return None if path is None else str(path), step

    found, done = process_group().from_main(find)
    return None if found is None else Path(found), done


def _dynamic_sampling(task: TrainTask, policy: Policy, checkpoint: Path | None) -> DynamicSampling | None:
    """Return the object that refills generation batches, if the config asks for it, at the position of a checkpoint."""
    refills = task.config.train.dynamic_sampling
    if not refills:
        return None
    drawn = 0 if checkpoint is None else read_manifest(checkpoint, CHECKPOINT, made_by=MADE_BY).details["drawn"]
    settings, pad_id = task.settings, policy.tokenizer.pad_token_id
    return DynamicSampling(task.reward, settings.num_generations, refills, pad_id, settings.pad_to_multiple_of, drawn)


def newest_checkpoint(folder: Path, last: int) -> tuple[Path | None, int]:
    """Return the newest finished checkpoint and its step, or (None, 0). Remove unfinished ones.

    Only folders `checkpoint-STEP` with a step up to `last` count. Everything else is left alone.
    """
    finished = {step: path for step, path in checkpoints(folder, last).items() if _is_finished(path, step)}
    return (finished[max(finished)], max(finished)) if finished else (None, 0)


def open_checkpoint(path: Path) -> Path:
    """Check all files of a finished checkpoint; return its path."""
    open_artifact(path, CHECKPOINT, made_by=MADE_BY)
    return path


def _is_finished(checkpoint: Path, step: int) -> bool:
    """Whether a checkpoint is complete. Remove it if not; refuse one whose step differs from its name."""
    if not is_finished(checkpoint):
        warn(f"{checkpoint} is not complete and is removed; training goes on from the checkpoint before it")
        shutil.rmtree(checkpoint)
        return False
    known = read_manifest(checkpoint, CHECKPOINT, made_by=MADE_BY).inputs["step"]
    if known != step:
        raise corrupt(checkpoint, f"is a checkpoint of step {known}", f"move {checkpoint} away and run again.")
    return True


def _begin_from(task: TrainTask, checkpoint: Path | None, step: int) -> None:
    """Check the checkpoint that training goes on from, and drop the rewards of an interrupted attempt beyond it."""
    if checkpoint is not None:
        open_checkpoint(checkpoint)
    task.reward.forget_from(step)
