"""TRL's GRPOTrainer on the selections of stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor, nn
from torch.utils.data import Sampler
from trl import GRPOTrainer

from cropi.artifacts import full_disk_named
from cropi.console import warn_once
from cropi.errors import ArtifactError
from cropi.fsdp import in_lockstep, is_sharded
from cropi.policy import shared_prefixes
from cropi.training.dynamic_sampling import DynamicSampling
from cropi.training.reward_log import Judged
from cropi.training.sharding import gathered, out_of_step
from cropi.training.stage_sampler import BatchShape, StageSampler

# (stage, model, whether training stands in the middle of the stage) -> selected prompt ids
SelectStage = Callable[[int, nn.Module, bool], Sequence[str]]


class StageTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with the batches of a StageSampler, and without a model card.

    With dynamic sampling it draws the prompts of a generation batch itself, from the same sampler: how many a batch
    takes is not known when the loader fetches the next.
    """

    def __init__(self, *args: Any, steps_per_stage: int, **kwargs: Any) -> None:
        self.steps_per_stage = steps_per_stage
        self.stage_sampler: StageSampler | None = None
        self.dynamic: DynamicSampling | None = None
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, dataset: datasets.Dataset | None = None) -> Sampler[int]:
        shape = BatchShape.of(self.args, self.num_iterations)
        micro_steps = self.steps_per_stage * self.args.gradient_accumulation_steps
        self.stage_sampler = StageSampler(shape, micro_steps // shape.repeats, self.args.seed)
        return self.stage_sampler

    def _sampled(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's generation batch, in which completions of a prompt share its forward pass if transformers generates."""
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

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.dynamic is None:
            return self._sampled(inputs)
        return self._filled(self.dynamic, len(inputs) // self.num_generations)

    def _filled(self, dynamic: DynamicSampling, prompts: int) -> dict[str, Any]:
        refilled = dynamic.fill(self._sample, prompts)
        if refilled.dropped is not None:
            self._drop(refilled.dropped)
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

    def _drop(self, judged: Judged) -> None:
        """Called with the groups that were sampled and are not trained on."""

    def _sample(self, prompts: int) -> dict[str, Any]:
        """The groups of the stage's next prompts."""
        assert self.stage_sampler is not None, "a stage is started before anything is sampled"
        assert self.dynamic is not None, "without dynamic sampling the loader brings the prompts"
        positions = self.stage_sampler.draw(prompts)
        self.dynamic.drawn += prompts
        rows = [self.train_dataset[position] for position in positions for _ in range(self.num_generations)]
        return self._sampled(rows)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but that old checkpoints stay until the new one is finished: see `StageCallback`."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if folder.is_symlink() or folder.is_file():
            raise ArtifactError("is in the way of a checkpoint", where=str(folder), fix="move it and run again.")
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with full_disk_named(folder):
                super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: TRL's would say that the policy was fine-tuned from a model of no name, and link to it."""


@dataclass
class Stages:
    """The selections of a training, and the start of a stage in its sampler."""

    select: SelectStage
    position_of: Mapping[str, int]
    trainer: StageTrainer
    _selections: list[tuple[int, ...]] = field(default_factory=list)

    def begin(self, step: int) -> None:
        """Start the stage that an optimiser step lies in; after a resume, with the selections of those before it.

        With dynamic sampling only the trainer knows how many prompts of a selection are taken.
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
        dynamic = self.trainer.dynamic
        if dynamic is not None and step == first * self.trainer.steps_per_stage:  # a new selection
            dynamic.drawn = 0
        sampler.start_stage(stage, self._selections[stage], first, consumed=None if dynamic is None else dynamic.drawn)

    def _remember(self, stage: int, *, in_progress: bool) -> None:
        with self.trainer.plain_model() as model:
            ids = self.select(stage, model, in_progress)
        self._selections.append(tuple(sorted(self.position_of[prompt_id] for prompt_id in ids)))
