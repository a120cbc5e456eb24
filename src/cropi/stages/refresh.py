"""`refresh`: trajectories newer than the base policy's, at the start of a stage; `screen`: a smaller sample."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from cropi.artifacts import build, open_artifact
from cropi.console import counts_text, say
from cropi.curriculum.stale_trajectories import prompts_to_refresh
from cropi.curriculum.strategies.pooled import SCREEN_GENERATIONS, PooledStrategy
from cropi.functional.ranking import selection_size
from cropi.gradients.validation_groups import chosen_for_validation
from cropi.parallel import process_group
from cropi.policy import Policy
from cropi.stages.collect import Collector, collector
from cropi.stages.run import Run
from cropi.stages.score import read_scores
from cropi.stages.select import gather_candidates
from cropi.stages.trajectories import FRESH, REUSED, newest_rollouts, read_overlay, require_signal

MADE_BY = "cropi train"


def refresh(run: Run, stage: int, model: nn.Module, origin: str) -> None:
    """Make the newer trajectories that the config asks for; `origin` names the policy."""
    if not run.trajectories.refreshes(stage):
        return
    settings, policy = run.config.refresh, Policy(model, run.setup.policy.tokenizer)
    inputs: dict[str, Any] = {"trajectories": run.trajectories.identity, "policy": origin}
    inputs |= {"settings": run.folder.settings()}
    if settings.reuse_rollouts:
        steps = run.config.train.steps_per_stage
        copy = partial(newest_rollouts, run.paths.rollouts, (stage - 1) * steps, stage * steps)
        build(run.paths.reused(stage), REUSED, copy, inputs=inputs, made_by=MADE_BY)
    if run.trajectories.refreshes_validation(stage):
        _sample(run, run.paths.fresh_validation(stage), stage, policy, _validation_rows(run), inputs)
    if settings.fraction:
        _sample_pool(run, stage, policy, inputs)
    overlay = run.trajectories.overlay(stage)
    require_signal(run.trajectories.statuses(run.trajectories.groups(overlay)))


def _validation_rows(run: Run) -> list[dict[str, Any]]:
    """The validation prompts that scoring uses."""
    chosen = {
        (name, prompt_id)
        for name, table in run.trajectories.base.items()
        if name != "train"
        for prompt_id in chosen_for_validation(table.column("prompt_id").unique().to_pylist(), run.config.score)
    }
    return [row for row in run.folder.prompt_rows if (row["set"], row["prompt_id"]) in chosen]


def _sample_pool(run: Run, stage: int, policy: Policy, inputs: Mapping[str, Any]) -> None:
    """Sample the prompts of the pool again whose trajectories are worth the least now."""
    trajectories, prompts, strategy = run.trajectories, run.folder.train_prompts, run.config.select.strategy
    before = read_overlay(trajectories.layers(stage, sampled=False), mask_truncated=trajectories.mask_truncated)
    inputs = {**inputs, **({} if before.identity is None else {"refresh": before.identity})}
    scores: pa.Table | None = None
    if strategy.reads_scores:
        newest = strategy.scored_stage(stage - 1)
        scores = read_scores(run, newest)
        inputs["scores"] = open_artifact(run.paths.scores(newest), "scores", made_by=MADE_BY).identity
    ids = list(prompts)
    chosen = prompts_to_refresh(
        ids,
        trajectories.statuses(trajectories.groups(before)),
        before.drawn(ids),
        before.reused(ids, stage),
        np.full(len(ids), np.nan) if scores is None else scores.column("ratio_ess").to_numpy(),
        selection_size(run.config.refresh.fraction, len(ids)),
        seed=run.config.seed,
        stage=stage,
    )
    _sample(run, run.paths.fresh(stage), stage, policy, [prompts[prompt_id] for prompt_id in chosen], inputs)


def _sample(
    run: Run, folder: Path, stage: int, policy: Policy, rows: list[dict[str, Any]], inputs: Mapping[str, Any]
) -> None:
    def make(folder: Path) -> tuple[Mapping[str, int], Mapping[str, Any]]:
        return collector(run, policy).collect_again(rows, folder, stage)

    manifest = build(folder, FRESH, make, inputs=inputs, made_by=MADE_BY, **run.in_parts)
    say(f"{folder.parent.name.replace('-', ' ')} trajectories of stage {stage}: {counts_text(manifest.counts)}")


def screen(run: Run, stage: int, model: nn.Module, origin: str) -> None:
    """Sample a few trajectories of the prompts that a strategy that pools would choose, if it asks for them."""
    strategy = run.config.select.strategy
    if not (isinstance(strategy, PooledStrategy) and strategy.screen):
        return
    fewer = run.config.collect.model_copy(update={"num_generations": SCREEN_GENERATIONS})
    config, policy = run.config.model_copy(update={"collect": fewer}), Policy(model, run.setup.policy.tokenizer)

    def make(folder: Path) -> tuple[Mapping[str, int], Mapping[str, Any]]:
        size = selection_size(run.config.select.fraction, len(run.folder.train_prompts))
        ids = process_group().from_main(lambda: strategy.prompts_to_screen(gather_candidates(run, stage), size))
        rows = [run.folder.train_prompts[prompt_id] for prompt_id in ids]
        sampler = Collector(config, policy, run.judge, run.ledger)
        return sampler.collect_again(rows, folder, stage, "screen", logprobs=False)

    inputs = {**run.trajectories.inputs(stage), "policy": origin, "settings": run.folder.settings()}
    manifest = build(run.paths.screened(stage), FRESH, make, inputs=inputs, made_by="cropi score", **run.in_parts)
    say(f"screened trajectories of stage {stage}: {counts_text(manifest.counts)}")
