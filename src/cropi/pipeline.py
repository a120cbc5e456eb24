"""The order of the stages, and what goes from one to the next. The only file that knows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn

from cropi.artifacts import (
    NOT_SAMPLED,
    SELECTION,
    USABLE,
    Manifest,
    build,
    is_finished,
    open_artifact,
    read_table,
)
from cropi.config import SAMPLED_BY, Config, PooledStrategy
from cropi.console import counts_text, say, warn
from cropi.curriculum.refresh import drift_warning
from cropi.curriculum.strategies.pooled import prompts_to_screen
from cropi.elsewhere import CarriedPolicy, Elsewhere
from cropi.errors import ArtifactError, ConfigError
from cropi.gradients.groups import group_facts
from cropi.gradients.score_shards import make_scorer
from cropi.gradients.surrogate_weights import surrogate_settings
from cropi.gradients.validation_groups import validation_groups
from cropi.lockstep import in_lockstep
from cropi.policy import Policy, Replica, chat_warnings, encode_prompts, load_policy, trainer_prompt, uses_chat
from cropi.prompts import data_identity, make_prompts
from cropi.report.report import make_report
from cropi.report.summary import Summary
from cropi.rewards.verdicts import ERROR, TIMEOUT
from cropi.rollouts.generation import Sampling, TransformersGenerator
from cropi.rollouts.orders import shards_elsewhere
from cropi.rollouts.overlay import FRESH, Trajectories
from cropi.rollouts.representations import KIND as REPRESENTED
from cropi.rollouts.representations import read_representations, represent
from cropi.seeds import derived_seed
from cropi.stages.collect import collect, collect_anew
from cropi.stages.evaluate import Question, evaluate, read_evaluations
from cropi.stages.gathering import Gatherer
from cropi.stages.given import Given, arm_at, questions, start_of_stage
from cropi.stages.refreshing import Refresher
from cropi.stages.score import score
from cropi.stages.select import require_signal, select
from cropi.stages.train import TrainTask, newest_checkpoint, open_checkpoint, train
from cropi.training.reward import RecordedReward
from cropi.training.settings import grpo_config
from cropi.workers import Workers
from cropi.workspace import Arm, Workspace, evaluation_files, forget_evaluations
from cropi.world import ALONE, World

MANY_FAILURES = 0.02  # share of the completions on which a verifier may fail without a word


class Pipeline:
    """The stages of a run. One whose artifact is complete is skipped, so the same command goes on where it stopped."""

    def __init__(
        self, config: Config, given: Given | None = None, world: World = ALONE, workers: Workers | None = None
    ) -> None:
        """`world` are the processes that work on this run: each makes its own pipeline, and asks it for the same.

        `workers` elsewhere collect and score in this process's place.
        """
        self.config, self.world, self._workers = config, world, workers
        given = given or Given.named_by(config, world.size)
        self._given, self._base_identity = given.policy, given.identity
        self._replica = Replica(given.policy, config.policy)
        self.judge, self.settings = given.judge, given.settings
        self.surrogate = surrogate_settings(config, self.settings.loss_type, self.settings.scale_rewards)
        self._chat = uses_chat(self._given.tokenizer, config.prompts.chat, config.prompts.system_prompt)
        self.space = Workspace(config, world)
        self.space.lock()
        masked = self.settings.mask_truncated_completions
        self.trajectories = Trajectories(self.space, group_facts, mask_truncated=masked)
        self.gathered = Gatherer(self.space, self.trajectories)

    @property
    def _in_parts(self) -> dict[str, Any]:
        """How an artifact is built whose parts are divided among the processes, and outlive an interruption."""
        return {"keep_parts": True, "shared": True, "world": self.world}

    @property
    def base(self) -> Policy:
        """The policy before training, as it is asked."""
        return Policy(self._replica.of(self._given.model), self._given.tokenizer)

    def run(self) -> Summary | None:
        """Prompts to report, of which the first process makes the summary."""
        self.prompts()
        _ = self._test_prompts  # what is refused of them is refused before anything is sampled
        self.collect()
        for arm in self.space.arms.values():
            self.train(arm)
        return self.report()

    # -- collect ---------------------------------------------------------------------------------------------------

    def prompts(self) -> Manifest:
        """The prompt table."""
        make = partial(make_prompts, self.config)
        inputs = data_identity(self.config) | {"settings": self.space.settings("prompts")}
        return build(self.space.prompts, "prompts", make, inputs=inputs, made_by="cropi collect", world=self.world)

    def collect(self) -> Manifest:
        """Trajectories of the base policy. SignalError where they hold nothing that the run's arms could learn from."""

        def make(folder: Path) -> tuple[Mapping[str, int], Mapping[str, Any]]:
            rows, ledger = self.space.prompt_rows, self.space.ledger
            chat, messages = self.config.prompts.chat, (row["messages"] for row in rows)
            for text in chat_warnings(self._given.tokenizer, chat, messages):
                warn(text)
            elsewhere = self._elsewhere(self.base.model, "base")
            make_shards = None if elsewhere is None else shards_elsewhere(elsewhere, self.config, folder, ledger)
            return collect(
                self.config, self.base, self.judge, rows, folder, ledger, representations, self.world, make_shards
            )

        known = self.world.from_main(lambda: is_finished(self.space.trajectories))
        if not known and any(arm.reads_scores for arm in self.config.arms.values()):
            make_scorer(self.config, self.base.model, self.surrogate)  # refuses a model before anything is generated
        made_by = {"settings": self.space.settings(*SAMPLED_BY)}
        inputs = {"prompts": self.prompts().identity, "policy": self._base_identity} | made_by
        representations = None
        if self.config.collect.nearby:
            self._represent("collect")
            representations = read_representations(self.space.representations)
        folder = self.space.trajectories
        manifest = build(folder, "trajectories", make, inputs=inputs, made_by="cropi collect", **self._in_parts)
        say(f"trajectories: {counts_text(manifest.counts)}")
        say(f"verdicts: {counts_text(manifest.details['verdicts'])}")
        self._warn_of_failures(manifest.details["verdicts"])
        statuses = self.trajectories.statuses(self.trajectories.base_groups)
        mixed, sampled = require_signal(statuses), len(self.trajectories.base_groups)
        say(f"groups: {mixed} of {sampled} mixed" + (", the others carry no signal now" if mixed < sampled else ""))
        if any(strategy.aims_at_validation for strategy in self.config.arms.values()):
            validation_groups(self.trajectories.base, self.config.score)
        return manifest

    def _warn_of_failures(self, verdicts: Mapping[str, int]) -> None:
        failed, total = verdicts.get(ERROR, 0) + verdicts.get(TIMEOUT, 0), sum(verdicts.values())
        if failed > MANY_FAILURES * total:
            warn(
                f"the verifier failed on {failed} of {total} completions, which earned nothing: should they have, mend "
                f"it, delete {self.space.trajectories} and run again (`cropi audit-rewards` tells more)"
            )

    def refresh(self, arm: Arm, stage: int, model: nn.Module, origin: str) -> None:
        """Make what the config wants newer than the base policy's trajectories; `origin` says which policy it is."""
        if self.trajectories.refreshes(arm, stage):
            newest = self.config.arms[arm.name].scored_stage(stage - 1)
            scores = self.gathered.scores(arm, newest) if self._uses_influence(arm) else None
            refresher = Refresher(self.space, self.trajectories, self.judge)
            refresher.refresh(arm, stage, Policy(model, self._given.tokenizer), origin, scores)
            require_signal(self.trajectories.statuses(self.trajectories.groups(self.trajectories.overlay(arm, stage))))

    # -- score and select --------------------------------------------------------------------------------------------

    def score(self, arm: Arm, stage: int, model: nn.Module, origin: str) -> Manifest:
        """Influence of all training prompts at a policy; `origin` says which policy it is."""
        self.require_ratios(origin)
        self.refresh(arm, stage, model, origin)
        if self.config.arms[arm.name].pools:
            self._represent("score", arm=arm.name, stage=stage)
        inputs = self.trajectories.inputs(arm, stage)
        prompts = self.space.train_prompts
        statuses = self.trajectories.statuses(self.trajectories.groups(self.trajectories.overlay(arm, stage)))

        def make(folder: Path) -> tuple[Mapping[str, int], Mapping[str, Any]]:
            elsewhere = self._elsewhere(model, origin)
            with self.space.ledger.charge("score", arm=arm.name, stage=stage, owed=self._owed_s) as entry:
                result = score(
                    self.config,
                    self.surrogate,
                    model,
                    self.trajectories.tables(arm, stage),
                    dict(zip(prompts, prompts.column("source"), strict=True)),
                    folder,
                    stage,
                    self.config.arms[arm.name],
                    [i for i, status in zip(prompts, statuses, strict=True) if status == NOT_SAMPLED],
                    self.world,
                    elsewhere,
                )
                if self.world.is_main:
                    entry["tokens"] = result[1]["tokens"]
                    entry["computed_tokens"] = result[1]["tokens_computed"]
                    entry["validation_tokens"] = result[1]["validation_tokens"]
            return result

        made_from = inputs | {"policy": origin, "settings": self.space.settings(arm=arm)}
        manifest = build(arm.scores(stage), "scores", make, inputs=made_from, made_by="cropi score", **self._in_parts)
        say(f"scores of stage {stage}: {counts_text(manifest.counts)}")
        text = drift_warning(manifest.details["drift"], stage, refreshing=self.config.refresh.active)
        if text is not None:
            warn(text)
        return manifest

    def _elsewhere(self, model: nn.Module, origin: str) -> Elsewhere | None:
        if self._workers is None:
            return None
        return Elsewhere(self._workers, CarriedPolicy.of(self.config.policy, model, named=origin == "base"))

    def _owed_s(self) -> float:
        return 0.0 if self._workers is None else self._workers.owed_s

    def require_ratios(self, origin: str) -> None:
        """Importance ratios, unless the policy is the one that sampled."""
        if origin != "base" and not self.config.collect.logprobs:
            raise ConfigError(
                "the trajectories have no behaviour log-probs, so no policy but the base policy can be scored by them",
                where="collect.logprobs",
                fix="start a run with collect.logprobs=true.",
            )

    def _represent(self, phase: str, **charged: Any) -> None:
        """Where the base policy sees the prompts: one forward pass over them, a cost of the phase that first asks."""

        def make(folder: Path) -> tuple[Mapping[str, int], Mapping[str, Any]]:
            with self.space.ledger.charge(phase, **charged) as entry:
                result = represent(self.config, self.base, self.space.prompt_rows, folder, self.world)
                read = result[1]["prompt_tokens"]
                entry |= (
                    {"forward_tokens": read} if phase == "score" else {"tokens": 0, "prompt_tokens": read, "passes": 1}
                )
            return result

        inputs: dict[str, Any] = {"prompts": self.prompts().identity, "policy": self._base_identity}
        inputs |= {"settings": self.space.settings("policy", "prompts")}
        folder = self.space.representations
        build(folder, REPRESENTED, make, inputs=inputs, made_by=f"cropi {phase}", world=self.world, shared=True)

    def screen(self, arm: Arm, stage: int, model: nn.Module, origin: str) -> None:
        """A few trajectories of the prompts that a strategy that pools would choose, if it asks for them."""
        strategy = self.config.arms[arm.name]
        if not (isinstance(strategy, PooledStrategy) and strategy.screen):
            return
        fewer = self.config.collect.model_copy(update={"num_generations": strategy.screen_generations})
        config, policy = self.config.model_copy(update={"collect": fewer}), Policy(model, self._given.tokenizer)

        def make(folder: Path) -> tuple[Mapping[str, int], Mapping[str, Any]]:
            ids = self.world.from_main(
                lambda: prompts_to_screen(self.gathered.candidates(arm, stage), strategy, self.config.select)
            )
            rows = [self.space.train_prompts[prompt_id] for prompt_id in ids]
            where: dict[str, Any] = {"arm": arm.name, "stage": stage, "purpose": "screen", "world": self.world}
            return collect_anew(config, policy, self.judge, rows, folder, self.space.ledger, **where, logprobs=False)

        inputs = {**self.trajectories.inputs(arm, stage), "policy": origin, "settings": self.space.settings(arm=arm)}
        manifest = build(arm.screened(stage), FRESH, make, inputs=inputs, made_by="cropi score", **self._in_parts)
        say(f"screened trajectories of stage {stage}: {counts_text(manifest.counts)}")

    def select(self, arm: Arm, stage: int) -> list[str]:
        """Prompt ids of a stage's selection, read back where it has been made."""

        def make(folder: Path) -> tuple[Mapping[str, int], Mapping[str, Any]]:
            with self.space.ledger.charge("select", arm=arm.name, stage=stage):
                strategy = self.config.arms[arm.name]
                return select(
                    self.config, strategy, self.gathered.candidates(arm, stage), self.space.train_prompts, folder
                )

        inputs: dict[str, Any] = {**self.trajectories.inputs(arm, stage), "settings": self.space.settings(arm=arm)}
        if self._uses_influence(arm):
            folder = arm.scores(self.config.arms[arm.name].scored_stage(stage))
            inputs["scores"] = open_artifact(folder, "scores", made_by="cropi score").identity
        if self.world.from_main(lambda: is_finished(arm.screened(stage))):
            inputs["screened"] = open_artifact(arm.screened(stage), FRESH, made_by="cropi score").identity
        folder = arm.selection(stage)
        new = self.world.from_main(lambda: not is_finished(folder))
        manifest = build(folder, "selection", make, inputs=inputs, made_by="cropi select", world=self.world)
        if new:
            chosen = manifest.counts["selected"]
            say(f"selection of {arm.name}, stage {stage}: {chosen} of {len(self.space.train_prompts)} prompts")
        rows = read_table(folder / "selection.parquet", SELECTION).to_pylist()
        return [row["prompt_id"] for row in rows if row["selected"]]

    def _uses_influence(self, arm: Arm) -> bool:
        return self.config.arms[arm.name].reads_scores

    def select_stage(self, arm: Arm, stage: int, model: nn.Module, in_progress: bool) -> Sequence[str]:
        """What the trainer asks at the start of a stage, with the policy in memory."""
        if in_progress and not self.world.from_main(lambda: is_finished(arm.selection(stage))):
            raise ArtifactError(
                f"the selection of stage {stage} is gone, but training stands in or beyond that stage",
                where=str(arm.selection(stage)),
                fix=f"delete {arm.folder} to train this arm anew.",
            )
        if not in_progress:
            asked, origin = self._replica.of(model), self._origin(arm, stage)
            scores_now = self._uses_influence(arm) and self.config.arms[arm.name].scored_stage(stage) == stage
            (self.score if scores_now else self.refresh)(arm, stage, asked, origin)
            self.screen(arm, stage, asked, origin)
        return self.select(arm, stage)

    def _origin(self, arm: Arm, stage: int) -> str:
        return f"{arm.name} after step {stage * self.config.train.steps_per_stage}" if stage else "base"

    def arm_at(self, stage: int, checkpoint: Path | None) -> Arm:
        """The main arm, or a folder of its own for a checkpoint from elsewhere."""
        return arm_at(self.space, stage, checkpoint)

    def policy_at(self, arm: Arm, stage: int, checkpoint: Path | None) -> tuple[Policy, str]:
        """The policy at the start of a stage, and what it is called: for scoring outside training."""
        if checkpoint is not None:
            return load_policy(self.config.policy, str(checkpoint)), f"checkpoint {arm.folder.name}"
        if stage == 0:
            return self.base, "base"
        path = start_of_stage(self.config, arm, stage)
        return load_policy(self.config.policy, str(path)), self._origin(arm, stage)

    def require_reached(self, arm: Arm, stage: int) -> None:
        """A stage may be selected by hand once training has come to its start: some strategies read its rewards."""
        reached = newest_checkpoint(arm.checkpoints, self._last_step)[1] // self.config.train.steps_per_stage
        if stage > reached:
            raise ArtifactError(
                f"training of {arm.name} has not come to stage {stage} yet, only to {reached}",
                where="--stage",
                fix="run `cropi train` first.",
            )

    # -- train and evaluate ------------------------------------------------------------------------------------------

    def train(self, arm: Arm) -> Path:
        """Train all stages of an arm, evaluating on schedule from the base policy on; returns the last checkpoint."""
        self.evaluate_base()
        settings = grpo_config(self.config, arm.checkpoints, self._given.device, self.world.size)
        self.world.from_main(lambda: self._begin_at(arm, newest_checkpoint(arm.checkpoints, self._last_step)[1]))
        policy = load_policy(self.config.policy, dtype=self.config.policy.trained_in)
        status_of = dict(
            zip(self.space.train_prompts, self.trajectories.statuses(self.trajectories.base_groups), strict=True)
        )
        rows = [
            {"prompt": self._trainer_prompt(row), "prompt_json": row["messages"], "extra": row["extra"] or ""}
            | {name: row[name] for name in ("prompt_id", "answer", "source")}
            for row in self.space.train_prompts.rows()
            if status_of[row["prompt_id"]] in USABLE
        ]
        encoded = encode_prompts(self._given.tokenizer, [row["prompt"] for row in rows])
        rows = [row | {"prompt_tokens": len(ids)} for row, ids in zip(rows, encoded, strict=True)]
        task = TrainTask(
            label=arm.name,
            rows=rows,
            settings=settings,
            stages=self.config.train.stages,
            steps_per_stage=self.config.train.steps_per_stage,
            evaluate_every=self._evaluate_every,
            reward=RecordedReward(self.judge, arm.rewards, self.world),
            select_stage=lambda stage, model, in_progress: self.select_stage(arm, stage, model, in_progress),
            evaluate=lambda step, model: self._evaluate(model, step, arm),
            evaluated=lambda step: self._is_evaluated(arm.evaluation, step),
            folder=arm.folder,
            record_to=arm.rollouts if self.trajectories.reuses(arm) else None,
            dynamic_sampling=self.config.train.dynamic_sampling,
            asked_in=self.config.policy.dtype,
            world=self.world,
            made_by=self.space.settings(arm=arm),
        )
        done = self.world.from_main(lambda: newest_checkpoint(arm.checkpoints, self._last_step)[1])
        self._measure_again(arm, done - 1)  # while their checkpoints are there
        final = train(task, policy)
        self._measure_again(arm, self._last_step)
        return final

    @property
    def _last_step(self) -> int:
        return self.config.train.stages * self.config.train.steps_per_stage

    @property
    def _evaluate_every(self) -> int:
        return self.config.evaluate.every or self.config.train.steps_per_stage

    def _measure_again(self, arm: Arm, step: int) -> None:
        """Evaluations up to a step that were damaged and deleted."""
        for at in self.world.from_main(lambda: self._unevaluated(arm, step)):
            checkpoint = open_checkpoint(arm.checkpoints / f"checkpoint-{at}")
            self._evaluate(load_policy(self.config.policy, str(checkpoint)).model, at, arm)

    def _unevaluated(self, arm: Arm, step: int) -> list[int]:
        """Steps up to one after which the arm should have been evaluated, and is not."""
        known = evaluation_files(arm.evaluation)
        wanted = sorted({*range(self._evaluate_every, self._last_step, self._evaluate_every), self._last_step})
        return [at for at in wanted if at <= step and at not in known]

    def _begin_at(self, arm: Arm, step: int) -> None:
        """Drop evaluations beyond the step that training goes on from. Those before it have to be there."""
        forget_evaluations(arm.evaluation, step)
        for at in self._unevaluated(arm, step):
            if not is_finished(arm.checkpoints / f"checkpoint-{at}"):
                raise ArtifactError(
                    "is missing or not in its manifest, and the checkpoint of its step is gone",
                    where=str(arm.evaluation / f"step-{at:06}.parquet"),
                    fix=f"put back a copy of {arm.evaluation}, or delete {arm.folder} to train this arm anew.",
                )

    def evaluate_base(self) -> None:
        """Accuracy before training, the common first point of all arms."""
        if not self._is_evaluated(self.space.evaluation, 0):
            self._evaluate(self.base.model, 0, None)

    def _is_evaluated(self, folder: Path, step: int) -> bool:
        return self.world.from_main(lambda: step in evaluation_files(folder))

    def evaluate_at(self, checkpoint: Path | None) -> pa.Table:
        """Accuracy of the base policy or of any checkpoint, read back where it has been measured."""
        self.prompts()
        arm = None if checkpoint is None else self.arm_at(0, checkpoint)
        folder = self.space.evaluation if arm is None else arm.evaluation
        if self._is_evaluated(folder, 0):
            return read_evaluations(folder)[0]
        policy = self.base if checkpoint is None else load_policy(self.config.policy, str(checkpoint))
        return self._evaluate(policy.model, 0, arm)

    def _evaluate(self, model: nn.Module, step: int, arm: Arm | None) -> pa.Table:
        """`arm` is that of a trained policy."""
        policy = Policy(self._replica.of(model), self._given.tokenizer)
        sampler = TransformersGenerator(policy, self.config.collect.batch_size)

        def generate(prompts: Sequence[list[int]], temperature: float | None, seed: int) -> list[str]:
            sampling = Sampling(self.config.collect.max_completion_length, temperature)
            completions = sampler(prompts, sampling, seed=seed)
            return policy.tokenizer.batch_decode(completions, skip_special_tokens=True)

        seed = derived_seed(self.config.seed, "evaluate")
        charged = "" if arm is None else arm.folder.name
        with self.space.ledger.charge(
            "evaluate", arm=charged, stage=max(0, step - 1) // self.config.train.steps_per_stage
        ):
            return evaluate(
                self._test_prompts,
                generate,
                self.judge,
                self.config.evaluate,
                step=step,
                seed=seed,
                folder=self.space.evaluation if arm is None else arm.evaluation,
                block=self.config.collect.batch_size,
                lockstep=in_lockstep(policy.model),
                world=self.world,
                settings=self.space.settings(*SAMPLED_BY, "evaluate") if arm is None else self.space.settings(arm=arm),
            )

    @cached_property
    def _test_prompts(self) -> list[Question]:
        return questions(self.config, self._given, self.space.held_out("test"))

    def _trainer_prompt(self, row: Mapping[str, Any]) -> str | list[dict[str, Any]]:
        return trainer_prompt(row["messages"], chat=self._chat, system_prompt=self.config.prompts.system_prompt)

    # -- report ------------------------------------------------------------------------------------------------------

    def report(self) -> Summary | None:
        """Write report.html, report.md and summary.json from what the folder holds; the first process does."""
        return make_report(self.config, self.space.folder) if self.world.is_main else None
