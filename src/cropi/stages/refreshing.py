"""What an arm has newer than the base policy's trajectories at the start of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cropi.artifacts import build, open_artifact
from cropi.console import counts_text, say
from cropi.curriculum.refresh import prompts_to_refresh
from cropi.functional.ranking import selection_size
from cropi.gradients.validation_groups import chosen_for_validation
from cropi.policy import Policy
from cropi.rewards.verdicts import Judge
from cropi.rollouts.overlay import FRESH, REUSED, Trajectories, newest_rollouts, read_overlay
from cropi.stages.collect import collect_anew
from cropi.workspace import Arm, Workspace

MADE_BY = "cropi train"


class Refresher:
    """Makes the artifacts that `Trajectories` then lays over the base policy's."""

    def __init__(self, space: Workspace, trajectories: Trajectories, judge: Judge) -> None:
        self._space, self._config, self._trajectories, self._judge = space, space.config, trajectories, judge

    def refresh(self, arm: Arm, stage: int, policy: Policy, origin: str, scores: pa.Table | None) -> None:
        """All that the config asks for. `scores` are the arm's newest, `origin` says which policy it is."""
        settings = self._config.refresh
        inputs: dict[str, Any] = {"trajectories": self._trajectories.identity, "policy": origin}
        inputs |= {"settings": self._space.settings(arm=arm)}
        if settings.reuse_rollouts:
            steps = self._config.train.steps_per_stage
            copy = partial(newest_rollouts, arm.rollouts, (stage - 1) * steps, stage * steps)
            build(arm.reused(stage), REUSED, copy, inputs=inputs, made_by=MADE_BY, world=self._space.world)
        if self._trajectories.refreshes_validation(arm, stage):
            self._sample(arm.fresh_validation(stage), arm, stage, policy, self._validation_rows(), inputs)
        if settings.fraction:
            self._sample_pool(arm, stage, policy, inputs, scores)

    def _validation_rows(self) -> list[dict[str, Any]]:
        """The validation prompts that scoring uses."""
        chosen = {
            (name, prompt_id)
            for name, table in self._trajectories.base.items()
            if name != "train"
            for prompt_id in chosen_for_validation(table.column("prompt_id").unique().to_pylist(), self._config.score)
        }
        return [row for row in self._space.prompt_rows if (row["set"], row["prompt_id"]) in chosen]

    def _sample_pool(
        self, arm: Arm, stage: int, policy: Policy, inputs: Mapping[str, Any], scores: pa.Table | None
    ) -> None:
        layers = self._trajectories.layers(arm, stage, sampled=False)
        before = read_overlay(layers, mask_truncated=self._trajectories.mask_truncated)
        inputs = {**inputs, **({} if before.identity is None else {"refresh": before.identity})}
        if scores is not None:
            newest = self._config.arms[arm.name].scored_stage(stage - 1)
            inputs["scores"] = open_artifact(arm.scores(newest), "scores", made_by=MADE_BY).identity
        ids = list(self._space.train_prompts)
        chosen = prompts_to_refresh(
            ids,
            self._trajectories.statuses(self._trajectories.groups(before)),
            before.drawn(ids),
            before.reused(ids, stage),
            np.full(len(ids), np.nan) if scores is None else scores.column("ratio_ess").to_numpy(),
            selection_size(self._config.refresh.fraction, len(ids)),
            seed=self._config.seed,
            stage=stage,
        )
        rows = [self._space.train_prompts[prompt_id] for prompt_id in chosen]
        self._sample(arm.fresh(stage), arm, stage, policy, rows, inputs)

    def _sample(
        self,
        folder: Path,
        arm: Arm,
        stage: int,
        policy: Policy,
        rows: list[dict[str, Any]],
        inputs: Mapping[str, Any],
    ) -> None:
        world = self._space.world

        def make(folder: Path) -> tuple[Mapping[str, int], Mapping[str, Any]]:
            where: dict[str, Any] = {"arm": arm.name, "stage": stage, "world": world}
            return collect_anew(self._config, policy, self._judge, rows, folder, self._space.ledger, **where)

        manifest = build(folder, FRESH, make, inputs=inputs, made_by=MADE_BY, keep_parts=True, world=world, shared=True)
        say(f"{folder.name.replace('_', ' ')} trajectories of stage {stage}: {counts_text(manifest.counts)}")
