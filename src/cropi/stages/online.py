"""The chooser of a run's batches: its parts from the run's config and prompts, with every cost charged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from trl import GRPOConfig

from cropi.artifacts import build, is_finished, open_artifact, read_manifest, read_table, remove, write_batches
from cropi.config.loading import load_config
from cropi.curriculum.belief import HALF_LIFE
from cropi.curriculum.chooser import ChoosesBatches, GroupGate, Pool
from cropi.curriculum.curriculum import Curriculum
from cropi.curriculum.strategies.cropi import CropiStrategy
from cropi.errors import ConfigError
from cropi.gradients.layer_taps import matrix_parameters
from cropi.parallel import process_group
from cropi.prompt_text import prompt_text
from cropi.rewards.verifier import answered
from cropi.rollouts.generation import Sampling, TransformersGenerator
from cropi.run_folder import RunFolder
from cropi.run_tables import beliefs_schema
from cropi.seeds import derived_seed
from cropi.stages.collect import REPRESENTED, make_representations, read_representations
from cropi.stages.online_loop import ChooserLoop, OnlineLoop, load_state
from cropi.stages.online_trainer import ReadsInfluence
from cropi.stages.run import Run
from cropi.stages.validation_pass import Answer, Due, Member, SampledGroup, ValidationPass, ValidationPrompt
from cropi.streams import append_jsonl, cut_jsonl
from cropi.training.group_evidence import GroupEvidence, LossNormalizer
from cropi.training.reward_log import RewardLog
from cropi.training.stage_sampler import BatchShape, OnlineSampler


class OnlineRun:
    """Makes the loop of a run's chooser, and charges what it samples, differentiates, reads and chooses."""

    def __init__(self, run: Run, rows: Sequence[Mapping[str, Any]], reward: RewardLog) -> None:
        """`rows` are the trainer's: the pool, in the order of the chooser's places."""
        self._run, self._rows, self._reward = run, rows, reward
        strategy = run.config.select.strategy
        self._only_observes = isinstance(strategy, CropiStrategy) and strategy.observe_only
        assert isinstance(strategy, ChoosesBatches)
        self._make_chooser = strategy.chooser
        self._trainer: ReadsInfluence
        self._loop: ChooserLoop

    def loop(self, trainer: ReadsInfluence, checkpoint: Path | None) -> ChooserLoop:
        """The loop of a trainer, at the start of training or where a checkpoint left it."""
        run, self._trainer = self._run, trainer
        sampler = self._sampler()
        if run.config.select.strategy.reads_representations:
            make_representations(run)
        with run.ledger.charge("select"):
            self._chooser = self._make_chooser(self._pool())
            if checkpoint is None:
                self._take_prior()
        loop = self._loop = self._made_loop(sampler)
        if checkpoint is not None:
            loop.load(checkpoint)
        if process_group().is_main:
            kept = len(loop.sampler.choices)
            cut_jsonl(run.paths.choices, lambda row: row["batch"] < kept)
        return loop

    def _take_prior(self) -> None:
        strategy = self._run.config.select.strategy
        if isinstance(strategy, CropiStrategy) and strategy.prior is not None:
            assert isinstance(self._chooser, Curriculum)
            take_prior(self._run, self._chooser, [row["prompt_id"] for row in self._rows], strategy.prior)

    def _sampler(self) -> OnlineSampler:
        settings, trainer = self._trainer.args, self._trainer
        micro_steps = self._run.config.train.steps_per_stage * settings.gradient_accumulation_steps
        shape = BatchShape.of(settings, trainer.num_iterations)
        self._batches_per_step = settings.gradient_accumulation_steps / shape.repeats
        choose = None if self._only_observes else self._choose
        draws = self._run.config.train.dynamic_sampling > 0
        return OnlineSampler(shape, micro_steps // shape.repeats, settings.seed, choose, draws=draws)

    def _made_loop(self, sampler: OnlineSampler) -> ChooserLoop:
        settings, chooser, pad_id = self._trainer.args, self._chooser, self._run.setup.policy.tokenizer.pad_token_id
        prompt_tokens = self.prompt_tokens if isinstance(chooser, Curriculum) else {}
        batch_scaled = settings.scale_rewards == "batch"
        if isinstance(chooser, GroupGate):
            _check_gate(settings)
        parts: dict[str, Any] = {
            "sampler": sampler,
            "reward": self._reward,
            "evidence": GroupEvidence(prompt_tokens, settings.num_generations, pad_id, batch_scaled=batch_scaled),
            "place_of": {row["prompt_id"]: place for place, row in enumerate(self._rows)},
            "draws": self._run.config.train.dynamic_sampling > 0,
        }
        if not isinstance(chooser, Curriculum):
            return ChooserLoop(chooser=chooser, **parts)
        self._validation = self._validation_pass()
        return OnlineLoop(
            chooser=chooser,
            normalizer=LossNormalizer(settings, process_group().size),
            validation=self._validation,
            model=self._trainer.accelerator.unwrap_model(self._trainer.model),
            sample=self._sample,
            differentiate=self._differentiate,
            keep_beliefs=self._keep_beliefs,
            **parts,
        )

    @cached_property
    def prompt_tokens(self) -> dict[str, tuple[int, ...]]:
        """Tokens of the training prompts by id."""
        prompts = self._run.folder.train_prompts
        return dict(zip(prompts, map(tuple, self._run.encode(list(prompts.rows()))), strict=True))

    def _pool(self) -> Pool:
        run, settings, strategy = self._run, self._trainer.args, self._run.config.select.strategy
        ids, members = [row["prompt_id"] for row in self._rows], run.folder.validation_prompts
        read = dict[str, Any]()
        if strategy.reads_texts:
            read["texts"] = [prompt_text(row["prompt_json"]) for row in self._rows]
            read["validation_texts"] = {
                n: [prompt_text(row["messages"]) for row in rows] for n, rows in members.items()
            }
        if strategy.reads_representations:
            open_artifact(run.folder.representations, REPRESENTED, made_by="cropi train")
            known = read_representations(run.folder.representations)
            read["states_NE"] = np.stack([known["train", prompt_id] for prompt_id in ids])
            read["validation_states"] = {
                n: np.stack([known[row["set"], row["prompt_id"]] for row in rows]) for n, rows in members.items()
            }
        return Pool(
            ids,
            derived_seed(run.config.seed, "curriculum"),
            generations=settings.num_generations,
            batch=max(1, round(settings.generation_batch_size // settings.num_generations * self._batches_per_step)),
            scaling="group" if settings.scale_rewards in {"group", True} else "none",
            sources=[row["source"] for row in self._rows],
            **read,
        )

    def _validation_pass(self) -> ValidationPass:
        run, collect = self._run, self._run.config.collect
        sets = {
            name: [ValidationPrompt(row, tokens) for row, tokens in zip(rows, run.encode(rows), strict=True)]
            for name, rows in run.folder.validation_prompts.items()
        }
        return ValidationPass(
            sets,
            Sampling(collect.max_completion_length, collect.temperature),
            run.surrogate,
            collect.batch_tokens,
            partial(derived_seed, run.config.seed, "validation"),
        )

    def _choose(self, batch: int, prompts: int) -> list[int]:
        """Ask the curriculum for a generation batch, and write its answer down."""
        now = self._trainer.state.global_step
        with self._run.ledger.charge("select", stage=self._stage(now)):
            step = now if self._run.config.train.dynamic_sampling else int(batch // self._batches_per_step)
            asked = self._chooser.next(prompts, step)  # by every process, whose states stay the same
            choices = process_group().from_main(lambda: asked)
        places = [choice.place for choice in choices]
        places = (places * prompts)[:prompts]  # a pool smaller than a batch is repeated
        self._loop.explained.append(choices)
        if process_group().is_main:
            line = {
                "batch": batch,
                "step": step,
                "stage": self._stage(step),
                "asked_at": now,
                "prompt_ids": [self._rows[place]["prompt_id"] for place in places],
                "why": [f"{c.source} {c.validation_set}".strip() for c in (choices * prompts)[:prompts]],
            }
            append_jsonl(self._run.paths.choices, line)
        return places

    def _sample(self, due: Due, step: int) -> dict[str, list[SampledGroup]]:
        with self._run.ledger.charge("collect", stage=self._stage(step)) as entry:
            groups = self._validation.sample(self._ask, due, step)
            asked = [
                (count, len(prompt.tokens))
                for name, counts in due.items()
                for count, prompt in zip(counts, self._validation.sets[name], strict=True)
            ]
            own = [ids for sampled in groups.values() for group in sampled for ids in group.completions]
            entry |= {"step": step, "passes": 1, "tokens": sum(map(len, own))}
            entry |= {"prompt_tokens": sum(count * length for count, length in asked)}
        return groups

    def _ask(self, members: Sequence[Member], seed: int) -> list[Answer]:
        """Sample and judge validation prompts. The global random state is left alone."""
        prompts = [self._validation.sets[name][place] for name, place in members]
        with self._trainer.plain_model() as model:
            policy = self._run.asked(model)
            generate = TransformersGenerator(policy, self._run.config.collect.batch_size)
            completions = generate([prompt.tokens for prompt in prompts], self._validation.sampling, seed=seed)
        texts = policy.tokenizer.batch_decode(completions, skip_special_tokens=True)
        judged = self._run.judge([answered(text, prompt.row) for text, prompt in zip(texts, prompts, strict=True)])
        return [
            Answer(prompt.tokens, ids, [1] * len(ids), judgement.reward)
            for prompt, ids, judgement in zip(prompts, completions, judged, strict=True)
        ]

    def _differentiate(
        self, groups: Mapping[str, Sequence[SampledGroup]], step: int
    ) -> Mapping[str, Mapping[int, Sequence[float]]]:
        charge = self._run.ledger.charge("score", stage=self._stage(step))
        with charge as entry, self._trainer.plain_model() as model:
            given, tokens, products = self._validation.differentiate(model, groups)
            entry |= {"step": step, "computed_tokens": 0, "validation_tokens": tokens}
            entry |= {"read_passes": products / matrix_parameters(model)}
        return given

    def _keep_beliefs(self, stage: int) -> None:
        """Write what is believed of every prompt at the end of a stage. It costs training nothing that it needs."""

        def make(folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
            table = self._chooser.table([row["prompt_id"] for row in self._rows])
            schema = beliefs_schema(self._run.config.prompts.validation)
            known, none = set(table.column_names), pa.nulls(len(table))
            columns = [table.column(name) if name in known else none for name in schema.names]
            batches = pa.table(columns, names=schema.names).cast(schema).to_batches()
            write_batches(folder / "beliefs.parquet", batches, schema)
            return {"prompts": len(table)}, {}

        path = self._run.paths.beliefs(stage)
        if process_group().is_main and path.exists():  # of an attempt that was interrupted, or of an earlier step
            remove(path)
        with self._run.ledger.charge("evaluate", stage=stage):
            inputs = {"settings": self._run.folder.settings()}
            build(path, "beliefs", make, inputs=inputs, made_by="cropi train")

    def _stage(self, step: int) -> int:
        return min(step // self._run.config.train.steps_per_stage, self._run.config.train.stages - 1)


def _check_gate(settings: GRPOConfig) -> None:
    """ConfigError where some groups of a generation batch cannot be trained on alone."""
    if process_group().size > 1:
        raise ConfigError(
            "groups of a generation batch are left out in one process alone",
            where="select.strategy",
            fix="start it without `accelerate launch`, or choose another strategy.",
        )
    if settings.num_generations % settings.steps_per_generation:
        raise ConfigError(
            f"some groups of a generation batch do not divide into {settings.steps_per_generation} micro-steps",
            where="trainer.per_device_train_batch_size",
            fix=f"set it so that the micro-steps of a generation batch divide {settings.num_generations}.",
        )


# -- a prior from an earlier run -----------------------------------------------------------------------------------

ANOTHER_RUN = HALF_LIFE  # steps that an observation of another run counts as older, and so half


def take_prior(run: Run, curriculum: Curriculum, prompt_ids: Sequence[str], folder: str) -> None:
    """Give a new curriculum what a finished run of `cropi` observed of the prompts and validation prompts of both.

    Observations keep their step, but for their age: both policies begin as the same one and are trained for as long.
    Rewards are left: they change fast. Raises ConfigError for a run whose influence is another policy's or in another
    unit.
    """
    earlier = RunFolder(load_config(folder))
    train, names = earlier.config.train, earlier.config.prompts.validation
    last = earlier.stages.checkpoints / f"checkpoint-{train.steps}"
    if not (is_finished(last) and is_finished(earlier.stages.beliefs(train.stages - 1))):
        raise _unfit("is not a finished run of cropi with its last checkpoint", folder)
    made_from = read_manifest(earlier.representations, REPRESENTED, made_by="cropi train").inputs
    if made_from["policy"] != run.setup.identity:
        raise _unfit("is a run of another policy", folder)
    if any(run.config.trainer.get(key) != earlier.config.trainer.get(key) for key in ("loss_type", "scale_rewards")):
        raise _unfit("has another loss_type or scale_rewards, so that its influence is in another unit", folder)
    open_artifact(last, "checkpoint", made_by="cropi train")
    beliefs = earlier.stages.beliefs(train.stages - 1) / "beliefs.parquet"
    their_ids = read_table(beliefs, beliefs_schema(names)).column("prompt_id").to_pylist()
    theirs, state = load_state(last)["curriculum"], curriculum.state_dict()
    for name in sorted(run.config.prompts.validation):
        pairs = (earlier, their_ids), (run.folder, prompt_ids)
        before, now = ([*ids, *_members(place, name)] for place, ids in pairs)
        known = carried(theirs[f"influence/{name}/seen"], before, now) if name in names else np.empty((0, 5))
        if not len(known):
            raise _unfit(f"has observed no prompt of this run for the validation set {name!r}", folder)
        state[f"influence/{name}/seen"] = known
    curriculum.load_state_dict(state)


def _members(folder: RunFolder, name: str) -> list[Any]:
    return [("held out", row["prompt_id"]) for row in folder.validation_prompts.get(name, [])]


def carried(seen_O5: np.ndarray, before: Sequence[Any], now: Sequence[Any]) -> np.ndarray:
    """Observations of points that both have, by the places of the new run."""
    place_of = {key: place for place, key in enumerate(now)}
    places_O = np.array([place_of.get(before[int(point)], -1) for point in seen_O5[:, 0]], dtype=float)
    found = seen_O5[places_O >= 0] - [0.0, 0.0, 0.0, 0.0, ANOTHER_RUN]
    found[:, 0] = places_O[places_O >= 0]
    return found


def _unfit(problem: str, folder: str) -> ConfigError:
    fix = "name a finished run of cropi on the same policy, or leave it out."
    return ConfigError(f"{folder} {problem}", where="select.strategy.prior", fix=fix)
