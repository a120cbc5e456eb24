"""The online curriculum of a run: its parts from the run's config and prompts, with every cost charged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cropi.artifacts import open_artifact
from cropi.curriculum.curriculum import Curriculum
from cropi.curriculum.strategies.online import OnlineStrategy
from cropi.functional.pooling import principal_points
from cropi.parallel import process_group
from cropi.prompt_encoding import encode_prompts, trainer_prompt, uses_chat
from cropi.rollouts.generation import Sampling, TransformersGenerator
from cropi.rollouts.representations import KIND as REPRESENTED
from cropi.rollouts.representations import read_representations
from cropi.seeds import derived_seed
from cropi.stages.collect import make_representations
from cropi.stages.online_loop import OnlineLoop
from cropi.stages.run import Run
from cropi.stages.validation_pass import Due, SampledGroup, ValidationPass, ValidationPrompt
from cropi.streams import append_jsonl, cut_jsonl
from cropi.training.group_evidence import GroupEvidence
from cropi.training.loss_normalizer import LossNormalizer
from cropi.training.online_sampler import OnlineSampler
from cropi.training.online_trainer import OnlineTrainer
from cropi.training.reward_log import RecordedReward
from cropi.training.stage_sampler import BatchShape


class OnlineRun:
    """Makes the `OnlineLoop` of a run, and charges what it samples, differentiates, reads and chooses."""

    def __init__(self, run: Run, rows: Sequence[Mapping[str, Any]], reward: RecordedReward) -> None:
        """`rows` are the trainer's: the pool, in the order of the curriculum's places."""
        self._run, self._rows, self._reward = run, rows, reward
        strategy = run.config.select.strategy
        assert isinstance(strategy, OnlineStrategy)
        self._observe_only = strategy.observe_only
        self._trainer: OnlineTrainer

    def loop(self, trainer: OnlineTrainer, checkpoint: Path | None) -> OnlineLoop:
        """The loop of a trainer, at the start of training or where a checkpoint left it."""
        run, settings, self._trainer = self._run, trainer.args, trainer
        make_representations(run, "score")
        self._validation = self._validation_pass()
        self._curriculum = self._made_curriculum()
        micro_steps = run.config.train.steps_per_stage * settings.gradient_accumulation_steps
        repeats = settings.steps_per_generation * trainer.num_iterations
        shape = BatchShape(
            settings.generation_batch_size // settings.num_generations, settings.num_generations, repeats
        )
        self._batches_per_step = settings.gradient_accumulation_steps / repeats
        choose = None if self._observe_only else self._choose
        sampler = OnlineSampler(shape, micro_steps // repeats, settings.seed, choose)
        encoded = encode_prompts(run.setup.policy.tokenizer, [row["prompt"] for row in self._rows])
        ids = [row["prompt_id"] for row in self._rows]
        loop = self._loop = OnlineLoop(
            curriculum=self._curriculum,
            sampler=sampler,
            reward=self._reward,
            evidence=GroupEvidence(
                {i: tuple(tokens) for i, tokens in zip(ids, encoded, strict=True)},
                settings.num_generations,
                run.setup.policy.tokenizer.pad_token_id,
                batch_scaled=settings.scale_rewards == "batch",
            ),
            normalizer=LossNormalizer.of(settings, process_group().size),
            validation=self._validation,
            place_of={prompt_id: place for place, prompt_id in enumerate(ids)},
            model=trainer.accelerator.unwrap_model(trainer.model),
            sample=self._sample,
            differentiate=self._differentiate,
        )
        if checkpoint is not None:
            loop.load(checkpoint)
        if process_group().is_main:
            kept = len(sampler.choices)
            cut_jsonl(run.paths.choices, lambda row: row["batch"] < kept)
        return loop

    def _made_curriculum(self) -> Curriculum:
        run, settings = self._run, self._trainer.args
        folder = run.folder.representations
        open_artifact(folder, REPRESENTED, made_by="cropi score")
        known = read_representations(folder)
        validation = {
            name: np.stack([known[f"validation/{name}", prompt.row["prompt_id"]] for prompt in prompts])
            for name, prompts in self._validation.sets.items()
        }
        ids = [row["prompt_id"] for row in self._rows]
        pool_NE = np.stack([known["train", prompt_id] for prompt_id in ids])
        every = principal_points(pool_NE, *validation.values())
        ends = np.cumsum([len(pool_NE), *map(len, validation.values())])
        points = dict(zip(validation, np.split(every[ends[0] :], ends[1:-1] - ends[0]), strict=True))
        return Curriculum(
            every[: len(pool_NE)],
            points,
            seed=derived_seed(run.config.seed, "curriculum"),
            scaling="group" if settings.scale_rewards in {"group", True} else "none",
            observe_only=self._observe_only,
        )

    def _validation_pass(self) -> ValidationPass:
        run, collect, prompts = self._run, self._run.config.collect, self._run.config.prompts
        tokenizer = run.setup.policy.tokenizer
        chat, rows = uses_chat(tokenizer, prompts.chat, prompts.system_prompt), run.folder.held_out("validation")
        texts = [trainer_prompt(row["messages"], chat=chat, system_prompt=prompts.system_prompt) for row in rows]
        sets: dict[str, list[ValidationPrompt]] = {name: [] for name in sorted(prompts.validation)}
        for row, tokens in zip(rows, encode_prompts(tokenizer, texts), strict=True):
            sets[row["set"].removeprefix("validation/")].append(ValidationPrompt(row, tokens))
        return ValidationPass(
            sets,
            run.judge,
            Sampling(collect.max_completion_length, collect.temperature, collect.top_p),
            run.surrogate,
            collect.batch_tokens,
            partial(derived_seed, run.config.seed, "validation"),
        )

    def _choose(self, batch: int, prompts: int) -> list[int]:
        """Ask the curriculum for a generation batch, and write its answer down."""
        with self._run.ledger.charge("select", stage=self._stage(self._trainer.state.global_step)):
            step = int(batch // self._batches_per_step)
            asked = self._curriculum.next(prompts, step)  # by every process, whose states stay the same
            choices = process_group().from_main(lambda: asked)
        places = [choice.place for choice in choices]
        places = (places * prompts)[:prompts]  # a pool smaller than a batch is repeated
        self._loop.explained.append(choices)
        if process_group().is_main:
            line = {
                "batch": batch,
                "step": step,
                "asked_at": self._trainer.state.global_step,
                "prompt_ids": [self._rows[place]["prompt_id"] for place in places],
                "why": [" ".join((choice.source, choice.validation_set)).strip() for choice in choices],
            }
            append_jsonl(self._run.paths.choices, line)
        return places

    def _sample(self, due: Due, step: int) -> dict[str, list[SampledGroup]]:
        run = self._run
        charge = run.ledger.charge("collect", stage=self._stage(step))
        with charge as entry, self._trainer.plain_model() as model:
            policy = run.asked(model)
            generate = TransformersGenerator(policy, run.config.collect.batch_size)
            groups = self._validation.sample(policy, generate, due, step)
            asked = [
                (count, len(prompt.tokens))
                for name, counts in due.items()
                for count, prompt in zip(counts, self._validation.sets[name], strict=True)
            ]
            own = [ids for sampled in groups.values() for group in sampled for ids in group.completions]
            entry |= {"step": step, "passes": 1, "tokens": sum(map(len, own))}
            entry |= {"prompt_tokens": sum(count * length for count, length in asked)}
        return groups

    def _differentiate(
        self, groups: Mapping[str, Sequence[SampledGroup]], step: int
    ) -> Mapping[str, Mapping[int, Sequence[float]]]:
        charge = self._run.ledger.charge("score", stage=self._stage(step))
        with charge as entry, self._trainer.plain_model() as model:
            given, tokens = self._validation.differentiate(model, groups)
            entry |= {"step": step, "computed_tokens": 0, "validation_tokens": tokens}
        return given

    def _stage(self, step: int) -> int:
        return min(step // self._run.config.train.steps_per_stage, self._run.config.train.stages - 1)
