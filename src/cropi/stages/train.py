"""`train`: one `GRPOTrainer.train()` for all stages of an arm."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from cropi.artifacts import (
    append_jsonl,
    corrupt,
    cut_jsonl,
    finish,
    is_finished,
    no_space,
    open_artifact,
    read_manifest,
)
from cropi.console import Progress, progress, warn, warn_once
from cropi.errors import ArtifactError, ConfigError, SignalError
from cropi.fsdp import in_lockstep, is_sharded
from cropi.parallel import process_group
from cropi.policy import Policy, shared_prefixes
from cropi.training.dynamic import DynamicSampling, Sampled
from cropi.training.reward import RecordedReward
from cropi.training.rollouts import RolloutRecorder, forget_rollouts, require_no_dropout
from cropi.training.sampler import BatchShape, StageSampler
from cropi.training.sharding import check_sharding
from cropi.training.zero import gathered, out_of_step, resuming
from cropi.workspace import checkpoints

CHECKPOINT = "checkpoint"  # kind of artifact
MADE_BY = "cropi train"
TORCH_CANNOT_WRITE = ("unexpected pos", "PytorchStreamWriter failed writing")  # all that torch says of a full disk

# (stage, model, whether training stands in the middle of the stage) -> selected prompt ids
SelectStage = Callable[[int, nn.Module, bool], Sequence[str]]
Evaluate = Callable[[int, nn.Module], None]  # (optimiser step, model)

RECORDED_ROW = "recorded_row"  # a key of TRL's batches: the row's place in its generation batch


class Staged(GRPOTrainer):
    """TRL's GRPOTrainer with the batches of a StageSampler. `steps_per_stage` is set before it trains."""

    steps_per_stage: int
    stage_sampler: StageSampler | None = None

    def _get_train_sampler(self, dataset: datasets.Dataset | None = None) -> Sampler[int]:
        repeats = self.args.steps_per_generation * self.num_iterations
        shape = BatchShape(self.args.generation_batch_size // self.num_generations, self.num_generations, repeats)
        micro_steps = self.steps_per_stage * self.args.gradient_accumulation_steps
        self.stage_sampler = StageSampler(shape, micro_steps // repeats, self.args.seed)
        return self.stage_sampler

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's, but that the completions of a prompt share its forward pass where transformers generates."""
        model = self.accelerator.unwrap_model(self.model)
        replaced = model.__dict__.get("generate")
        # for sharded parameters transformers puts another in its place: see `in_lockstep`
        generate = partial(type(model).generate, model) if is_sharded(model) else model.generate

        def sharing(input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Any:
            with in_lockstep(model), out_of_step(model):
                shared = shared_prefixes(model, input_ids, attention_mask)
                given = {"input_ids": input_ids, "attention_mask": attention_mask, "synced_gpus": False}
                return generate(**given, **shared, **settings)

        model.generate = sharing
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            del model.generate
            if replaced is not None:
                model.generate = replaced

    @contextmanager
    def plain_model(self) -> Iterator[nn.Module]:
        """The policy without the mixed precision that training wraps around its forward pass, and with whole weights.

        Stored log-probs and the base policy's accuracy were taken without it, and what is compared with them must be
        too.
        """
        model = self.accelerator.unwrap_model(self.model)
        wrapped, original = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
        with gathered(self):
            if wrapped is None or original is None:
                yield model
                return
            model.forward = original
            try:
                yield model
            finally:
                model.forward = wrapped


@dataclass
class Stages:
    """The selections of a training, and the start of a stage in its sampler."""

    select: SelectStage
    position_of: Mapping[str, int]
    trainer: Staged
    _selections: list[tuple[int, ...]] = field(default_factory=list)

    def begin(self, step: int, drawn: Callable[[bool], int] | None = None) -> None:
        """Start the stage that an optimiser step lies in; after a resume, with the selections of those before it.

        `drawn`, of whether its selection is new, says how many prompts of it are taken, where the sampler cannot know.
        """
        stage, inside = divmod(step, self.trainer.steps_per_stage)
        while len(self._selections) < stage:
            self._remember(len(self._selections), in_progress=True)
        self._remember(stage, in_progress=inside > 0)
        first = stage
        while first > 0 and self._selections[first - 1] == self._selections[stage]:
            first -= 1
        sampler = self.trainer.stage_sampler
        assert sampler is not None, "the data loader is made before the first epoch begins"
        consumed = None if drawn is None else drawn(step == first * self.trainer.steps_per_stage)
        sampler.start_stage(stage, self._selections[stage], first, consumed=consumed)

    def _remember(self, stage: int, *, in_progress: bool) -> None:
        with self.trainer.plain_model() as model:
            ids = self.select(stage, model, in_progress)
        self._selections.append(tuple(sorted(self.position_of[prompt_id] for prompt_id in ids)))


class StageTrainer(Staged):
    """A `Staged` trainer with a recorder of its rollouts, and without TRL's model card.

    With dynamic sampling it draws the prompts of a generation batch itself, from the same sampler: how many a batch
    takes is not known when the loader fetches the next.

    Where TRL takes the log-probs of a generation batch itself (`old_per_token_logps`), these are recorded. Otherwise
    all updates on the batch belong to one optimiser step, so the weights of the loss are those that sampled: its
    log-probs are recorded, found again by their rows, which TRL shuffles and splits together with the batch.
    """

    def __init__(self, *args: Any, steps_per_stage: int, **kwargs: Any) -> None:
        self.steps_per_stage = steps_per_stage
        self.recorder: RolloutRecorder | None = None
        self.dynamic: DynamicSampling | None = None
        self._recorded_rows: list[int] | None = None
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.dynamic is None:
            output = super()._generate_and_score_completions(inputs)
        else:
            output = self._filled(self.dynamic, len(inputs) // self.num_generations)
        if self.recorder is not None:
            self._begin_record(self.recorder, output)
            if "old_per_token_logps" in output:
                self.recorder.note(range(len(inputs)), output["old_per_token_logps"])
            else:
                output[RECORDED_ROW] = torch.arange(len(inputs))
        return output

    def _filled(self, dynamic: DynamicSampling, prompts: int) -> dict[str, Any]:
        refilled = dynamic.fill(self._sample, prompts)
        if self.recorder is not None and refilled.dropped is not None:
            self._record_dropped(self.recorder, dynamic, refilled.dropped)
        dynamic.reward.latest = refilled.trained.judged
        measured = {
            "equal_before": refilled.equal_before,
            "equal_after": refilled.equal_after,
            "extra": refilled.extra,
            "trained_tokens": sum(map(len, refilled.trained.judged.completion_ids)),
        }
        for name, value in measured.items():
            self._metrics["train"][f"dynamic_sampling/{name}"].append(float(value))
        if refilled.equal_after:
            warn_once(
                f"after {dynamic.refills} refills a generation batch still has groups whose rewards are all equal; "
                "they stay in it and teach nothing (metrics.jsonl: dynamic_sampling/equal_after)"
            )
        return dict(refilled.trained.tensors)

    def _sample(self, prompts: int) -> dict[str, Any]:
        """The groups of the stage's next prompts."""
        assert self.stage_sampler is not None, "a stage is started before anything is sampled"
        assert self.dynamic is not None, "without dynamic sampling the loader brings the prompts"
        positions = self.stage_sampler.draw(prompts)
        self.dynamic.drawn += prompts
        rows = [self.train_dataset[position] for position in positions for _ in range(self.num_generations)]
        return super()._generate_and_score_completions(rows)

    def _begin_record(self, recorder: RolloutRecorder, tensors: Mapping[str, Tensor]) -> None:
        pairs = zip(tensors["prompt_ids"].cpu(), tensors["prompt_mask"].cpu().bool(), strict=True)
        recorder.begin(self.state.global_step, [ids[mask].tolist() for ids, mask in pairs])

    def _record_dropped(self, recorder: RolloutRecorder, dynamic: DynamicSampling, dropped: Sampled) -> None:
        """Keep the groups that are not trained on as well: without them every prompt would look mixed."""
        tensors, dynamic.reward.latest = dropped.tensors, dropped.judged
        self._begin_record(recorder, tensors)
        logprobs_BT = tensors.get("old_per_token_logps")
        if logprobs_BT is None:
            ids, masks = (
                torch.cat([tensors[f"{part}_{kind}"] for part in ("prompt", "completion")], dim=1)
                for kind in ("ids", "mask")
            )
            width, size = tensors["completion_ids"].shape[1], self.args.per_device_train_batch_size
            with torch.no_grad():
                logprobs_BT = self._get_per_token_logps_and_entropies(self.model, ids, masks, width, batch_size=size)[0]
        recorder.note(range(len(logprobs_BT)), logprobs_BT)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        rows = inputs.get(RECORDED_ROW)
        self._recorded_rows = None if rows is None else rows.tolist()
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._recorded_rows = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any, Any]:
        logprobs_BT, entropies, auxiliary_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self.recorder is not None and self._recorded_rows is not None:
            self.recorder.note(self._recorded_rows, logprobs_BT)
        return logprobs_BT, entropies, auxiliary_loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but that old checkpoints stay until the new one is finished: see `StageCallback`."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if folder.is_symlink() or folder.is_file():
            raise ArtifactError("is in the way of a checkpoint", where=str(folder), fix="move it and run again.")
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError as error:
            if any(text in str(error) for text in TORCH_CANNOT_WRITE):
                raise no_space(folder) from None
            raise
        finally:
            self.args.save_total_limit = limit

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: TRL's would say that the policy was fine-tuned from a model of no name, and link to it."""


@dataclass
class StageCallback(TrainerCallback):
    """Starts every stage with its selection, evaluates on schedule, and marks checkpoints as complete.

    What is to be evaluated at the end of a stage is saved first: evaluation may take long, and what interrupts it must
    not cost the stage. It is made up for when training goes on from there.
    """

    stages: Stages
    task: TrainTask
    bar: Progress
    trainer: StageTrainer
    _due: bool = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._due = self._is_scheduled(state) and not self.task.evaluated(state.global_step)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        dynamic = self.trainer.dynamic

        def drawn(new: bool) -> int:
            assert dynamic is not None
            dynamic.drawn = 0 if new else dynamic.drawn
            return dynamic.drawn

        self._evaluate_if_due(state)
        self.stages.begin(state.global_step, None if dynamic is None else drawn)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._step_began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        ranks = process_group()
        if ranks.is_main:
            line = {"step": state.global_step, "seconds": (time.perf_counter() - self._step_began) * ranks.size}
            append_jsonl(self.task.folder / "steps.jsonl", line | ranks.facts())
        self.bar.advance()
        self._due = self._is_scheduled(state)
        if state.global_step % self.trainer.steps_per_stage:
            self._evaluate_if_due(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._evaluate_if_due(state)

    def _is_scheduled(self, state: TrainerState) -> bool:
        step = state.global_step
        return step > 0 and (step % self.task.evaluate_every == 0 or step == state.max_steps)

    def _evaluate_if_due(self, state: TrainerState) -> None:
        if self._due:
            self._due = False
            with self.trainer.plain_model() as model:
                self.task.evaluate(state.global_step, model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not process_group().is_main:
            return
        finite = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float) and abs(v) < float("inf")}
        append_jsonl(self.task.folder / "metrics.jsonl", finite | {"step": state.global_step})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        process_group().barrier()  # each process writes its random state
        if process_group().is_main:
            self._finish(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step)
        self._evaluate_if_due(state)

    def _finish(self, checkpoint: Path, step: int) -> None:
        dynamic = self.trainer.dynamic
        details = {} if dynamic is None else {"drawn": dynamic.drawn}
        inputs = {"step": step, "settings": self.task.made_by}
        finish(checkpoint, CHECKPOINT, inputs=inputs, counts={}, details=details)
        keep, found = self.task.settings.save_total_limit, checkpoints(checkpoint.parent, step)
        for old in sorted(found)[: -keep if keep else 0]:
            shutil.rmtree(found[old])


@dataclass(frozen=True)
class TrainTask:
    """What one arm is to be trained on, and what happens around its steps."""

    label: str
    rows: Sequence[Mapping[str, Any]]  # prompt_id, prompt (as TRL takes it), answer
    settings: GRPOConfig
    stages: int
    steps_per_stage: int
    evaluate_every: int
    reward: RecordedReward
    select_stage: SelectStage
    evaluate: Evaluate
    folder: Path
    record_to: Path | None = None  # where rollouts are kept as trajectories, if they are
    dynamic_sampling: int = 0  # refills of a generation batch at the most
    evaluated: Callable[[int], bool] = lambda step: False  # whether that step has been evaluated before
    asked_in: str = "float32"  # the dtype that the policy is asked in: `policy.dtype`
    made_by: Mapping[str, Any] = field(default_factory=dict)  # settings, for the manifests of checkpoints

    @property
    def total(self) -> int:
        """Steps of all stages."""
        return self.stages * self.steps_per_stage


def train(task: TrainTask, policy: Policy) -> Path:
    """Train all stages of an arm, going on from its newest complete checkpoint; returns the last checkpoint.

    One `train()` call keeps the optimiser state, the learning-rate schedule, the step count and the KL reference (the
    initial policy) over all stages.
    """
    total = task.total
    resume_from, done = _newest(task)
    if done == total and resume_from is not None:
        return resume_from
    process_group().from_main(lambda: _begin_from(task, resume_from, done))
    with progress(f"train {task.label}", total, "steps", done=done) as bar:
        trainer = _made_trainer(task, policy)
        check_sharding(trainer, task.asked_in, resume_from)
        position_of = {row["prompt_id"]: position for position, row in enumerate(task.rows)}
        stages = Stages(task.select_stage, position_of, trainer)
        trainer.add_callback(StageCallback(stages, task, bar, trainer))
        trainer.recorder = _recorder(task, policy)
        trainer.dynamic = _dynamic_sampling(task, policy, resume_from)
        trainer.remove_callback(PrinterCallback)  # this project has its own progress
        try:
            with resuming(trainer):
                trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            raise SignalError(
                "the policy has diverged: it gives no finite probabilities any more",
                where=f"arm {task.label}",
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


def _made_trainer(task: TrainTask, policy: Policy) -> StageTrainer:
    try:
        return StageTrainer(
            model=policy.model,
            reward_funcs=task.reward,
            args=task.settings,
            train_dataset=_dataset(task.rows),
            processing_class=policy.tokenizer,
            steps_per_stage=task.steps_per_stage,
        )
    except Exception as error:  # many kinds, for settings that do not fit this policy or a Hub that is not to be had
        raise ConfigError(
            f"TRL makes no trainer of them for this policy: {' '.join(str(error).split())}",
            where="trainer",
            fix="correct the setting it names, or leave it out, and start the run under another name.",
        ) from None


def _newest(task: TrainTask) -> tuple[Path | None, int]:
    """The newest checkpoint as the first process sees it, which also removes what is not complete."""

    def find() -> tuple[str | None, int]:
        path, step = newest_checkpoint(Path(task.settings.output_dir), task.total)
        return None if path is None else str(path), step

    found, done = process_group().from_main(find)
    return None if found is None else Path(found), done


def _recorder(task: TrainTask, policy: Policy) -> RolloutRecorder | None:
    """What keeps the rollouts, if they are to be kept. ConfigError where their log-probs would be noisy."""
    if task.record_to is None:
        return None
    require_no_dropout(policy.model)  # as the trainer leaves it
    generations, rank = task.settings.num_generations, process_group().rank
    return RolloutRecorder(task.record_to, task.reward, generations, policy.eos_ids, rank)


def _dynamic_sampling(task: TrainTask, policy: Policy, checkpoint: Path | None) -> DynamicSampling | None:
    """What refills generation batches, if they are to be; at the place in the selection where a checkpoint stands."""
    if not task.dynamic_sampling:
        return None
    drawn = 0 if checkpoint is None else read_manifest(checkpoint, CHECKPOINT, made_by=MADE_BY).details["drawn"]
    settings, pad_id = task.settings, policy.tokenizer.pad_token_id
    return DynamicSampling(
        task.reward, settings.num_generations, task.dynamic_sampling, pad_id, settings.pad_to_multiple_of, drawn
    )


def newest_checkpoint(folder: Path, last: int) -> tuple[Path | None, int]:
    """The newest finished checkpoint and its step, (None, 0) where there is none; unfinished ones are removed.

    Whatever is not a folder `checkpoint-STEP` of a step up to the `last` is not ours and left alone.
    """
    finished = {step: path for step, path in checkpoints(folder, last).items() if _is_finished(path, step)}
    return (finished[max(finished)], max(finished)) if finished else (None, 0)


def open_checkpoint(path: Path) -> Path:
    """A finished checkpoint, with all its files checked."""
    open_artifact(path, CHECKPOINT, made_by=MADE_BY)
    return path


def _is_finished(checkpoint: Path, step: int) -> bool:
    """Whether a checkpoint is whole, and the one that its name says; else it is removed."""
    if not is_finished(checkpoint):
        warn(f"{checkpoint} is not complete and is removed; training goes on from the checkpoint before it")
        shutil.rmtree(checkpoint)
        return False
    known = read_manifest(checkpoint, CHECKPOINT, made_by=MADE_BY).inputs["step"]
    if known != step:
        raise corrupt(checkpoint, f"is a checkpoint of step {known}", f"move {checkpoint} away and run again.")
    return True


def _begin_from(task: TrainTask, checkpoint: Path | None, step: int) -> None:
    """Check the checkpoint that training goes on from, and drop what an interrupted attempt recorded beyond it."""
    if checkpoint is not None:
        open_checkpoint(checkpoint)
    task.reward.forget_from(step)
    if task.record_to is not None:
        forget_rollouts(task.record_to, step)
    for name in ("steps.jsonl", "metrics.jsonl"):
        cut_jsonl(task.folder / name, lambda row: row["step"] <= step)
