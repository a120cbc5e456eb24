"""The newest trajectories of every prompt: groups of later policies in place of the base policy's, by stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from cropi.artifacts import (
    NOT_SAMPLED,
    OK,
    PROMPT_TOO_LONG,
    TRAJECTORIES,
    Manifest,
    check_file,
    count_status,
    is_finished,
    open_artifact,
    read_table,
    write_table,
)
from cropi.console import counts_text, warn, warn_once
from cropi.errors import SignalError
from cropi.reward_statistics import GroupFacts
from cropi.rollouts.shards import read_trajectories
from cropi.run_folder import RunFolder, StagePaths
from cropi.training.rollout_recorder import written_rollouts

FRESH = "fresh trajectories"  # kinds of artifacts
REUSED = "rollouts"
IMPORTED = "imported trajectories"


@dataclass(frozen=True)
class Layer:
    """Trajectories that are new at the start of a stage, at most one group per prompt."""

    folder: Path
    identity: str
    stage: int
    trained: bool  # sampled by the training of the stage before, rather than at the start of this one

    @property
    def drawn(self) -> int:
        """The stage in which they were sampled."""
        return self.stage - self.trained


@dataclass(frozen=True)
class Overlay:
    """The newest group of every prompt that has one newer than the base policy's."""

    table: pa.Table  # columns of TRAJECTORIES
    layer_of: Mapping[str, Layer]  # by prompt id
    identity: str | None  # of all layers together; None where there are none

    def over(self, base: pa.Table) -> pa.Table:
        """Replace the groups of the base trajectories by newer ones. Returns a table of one chunk.

        Works column by column, so that only one column is in memory twice.
        """
        if not self.layer_of:
            return base
        kept = pc.invert(pc.is_in(base.column("prompt_id"), value_set=pa.array(list(self.layer_of), pa.string())))
        columns = [
            pa.concat_arrays([*base.column(name).filter(kept).chunks, *self.table.column(name).chunks])
            for name in TRAJECTORIES.names
        ]
        return pa.table(columns, schema=TRAJECTORIES)

    def drawn(self, prompt_ids: Sequence[str]) -> Int[np.ndarray, " N"]:
        """The stage in which each prompt's newest group was sampled; -1 before all of them."""
        return np.array([self.layer_of[i].drawn if i in self.layer_of else -1 for i in prompt_ids])

    def drawn_at(self, steps_per_stage: int) -> dict[str, int]:
        """The optimiser step at which that stage began, for the prompts that have a newer group."""
        return {prompt_id: layer.drawn * steps_per_stage for prompt_id, layer in self.layer_of.items()}

    def reused(self, prompt_ids: Sequence[str], stage: int) -> Bool[np.ndarray, " N"]:
        """Whether each prompt's newest group was sampled by the training of the stage before."""
        layers = [self.layer_of.get(i) for i in prompt_ids]
        return np.array([layer is not None and layer.trained and layer.stage == stage for layer in layers])


def read_overlay(layers: Sequence[Layer], *, mask_truncated: bool = False) -> Overlay:
    """Read the group of the last layer for every prompt.

    `layers` are in the order in which they were sampled. For `mask_truncated` see `read_trajectories`.
    """
    tables, layer_of = [TRAJECTORIES.empty_table()], dict[str, Layer]()
    for layer in reversed(layers):
        tables_by_set = read_trajectories(layer.folder, mask_truncated=mask_truncated)
        table = tables_by_set.get("train", TRAJECTORIES.empty_table())
        known = pa.array(list(layer_of), pa.string())
        table = table.filter(pc.invert(pc.is_in(table.column("prompt_id"), value_set=known)))
        tables.append(table)
        layer_of |= dict.fromkeys(table.column("prompt_id").unique().to_pylist(), layer)
    text = json.dumps([layer.identity for layer in layers])
    return Overlay(pa.concat_tables(tables), layer_of, hashlib.sha256(text.encode()).hexdigest() if layers else None)


def newest_rollouts(
    rollouts: Path, first_step: int, end_step: int, folder: Path
) -> tuple[dict[str, int], dict[str, Any]]:
    """Copy to `folder` the newest group of every prompt that training sampled in steps [first_step, end_step).

    Reads one generation batch at a time. Returns (rows by status, details).
    """
    seen: set[str] = set()
    statuses: list[str] = []
    for (step, *_), (path, checksum) in sorted(written_rollouts(rollouts).items(), reverse=True):
        if not first_step <= step < end_step:
            continue
        check_file(path, checksum)
        rows = [row for row in read_table(path, TRAJECTORIES).to_pylist() if row["prompt_id"] not in seen]
        if rows:
            write_table(folder / path.name, rows, TRAJECTORIES)
        seen |= {row["prompt_id"] for row in rows}
        statuses += [row["status"] for row in rows]
    return count_status(statuses), {"prompts": len(seen)}


class Trajectories:
    """A run's trajectories at the start of a stage.

    Keeps the base policy's in memory, and the newer ones of the stage asked for last.
    """

    def __init__(
        self,
        folder: RunFolder,
        paths: StagePaths,
        facts: Callable[[pa.Table], dict[str, GroupFacts]],
        *,
        mask_truncated: bool = False,
    ) -> None:
        """`mask_truncated`: as the trainer's loss has it; see `read_trajectories`."""
        self._folder, self._paths, self._facts, self.mask_truncated = folder, paths, facts, mask_truncated
        self._latest: int | None = None
        self._overlay = read_overlay([])
        if folder.config.refresh.active and not self.refreshes(folder.config.train.stages - 1):
            warn_once("refresh has no effect: the run has one stage, or its strategy never reads newer trajectories")

    @cached_property
    def identity(self) -> str:
        """Identity of the base policy's trajectories."""
        return self._open().identity

    @cached_property
    def base(self) -> dict[str, pa.Table]:
        """The base policy's trajectories, by set."""
        self._open()  # checks the files
        none = {"train": TRAJECTORIES.empty_table()}  # for a strategy that collects nothing
        return none | read_trajectories(self._folder.trajectories, mask_truncated=self.mask_truncated)

    @cached_property
    def base_groups(self) -> dict[str, GroupFacts]:
        """Facts of the base policy's groups. The groups themselves need not fit into memory."""
        return self._facts(self.base["train"])

    def tables(self, stage: int) -> dict[str, pa.Table]:
        """Return the newest trajectories by set.

        A validation set that the policy now solves always or never keeps the base policy's.
        """
        newest = {"train": self.overlay(stage).over(self.base["train"])}
        if self.refreshes_validation(stage):
            fresh = read_trajectories(self._paths.fresh_validation(stage), mask_truncated=self.mask_truncated)
            for name, table in fresh.items():
                if any(group.status == OK for group in self._facts(table).values()):
                    newest[name] = table
                else:
                    warn(
                        f"stage {stage}: the policy solves each prompt of {name} in all tries or in none, so fresh "
                        "trajectories give no direction; the base policy's are used"
                    )
        return self.base | newest

    @cached_property
    def _too_long(self) -> frozenset[str]:
        return frozenset(self._open().details["too_long"])

    def statuses(self, groups: Mapping[str, GroupFacts]) -> list[str]:
        """Return the status of every training prompt from the facts of the groups."""
        without = {True: PROMPT_TOO_LONG, False: NOT_SAMPLED}
        return [groups[i].status if i in groups else without[i in self._too_long] for i in self._folder.train_prompts]

    def groups(self, overlay: Overlay) -> dict[str, GroupFacts]:
        """Facts of every prompt's newest group."""
        return {**self.base_groups, **self._facts(overlay.table)} if overlay.layer_of else self.base_groups

    def inputs(self, stage: int) -> dict[str, str]:
        """Identities of the trajectories, for the manifests of artifacts made from them."""
        refresh = self.overlay(stage).identity
        inputs = {"trajectories": self.identity} | ({} if refresh is None else {"refresh": refresh})
        if self.mask_truncated:
            inputs["truncated"] = "masked"
        if self.refreshes_validation(stage):
            inputs["validation"] = open_artifact(
                self._paths.fresh_validation(stage), FRESH, made_by="cropi train"
            ).identity
        return inputs

    def overlay(self, stage: int) -> Overlay:
        """Return the trajectories newer than the base policy's. ArtifactError if some have not been made yet."""
        if self._latest != stage:
            layers = self.layers(stage)
            self._overlay = read_overlay(layers, mask_truncated=self.mask_truncated)
            self._latest = stage
        return self._overlay

    def layers(self, stage: int, *, sampled: bool = True) -> list[Layer]:
        """List the newer trajectories, oldest first; without `sampled`, not those that the stage itself samples."""
        found: list[Layer] = []
        if is_finished(self._paths.imported):
            identity = open_artifact(self._paths.imported, IMPORTED, made_by="cropi import").identity
            found.append(Layer(self._paths.imported, identity, 0, trained=False))
        if not self.refreshes(stage):
            return found
        settings = self._folder.config.refresh
        for number in range(1, stage + 1):
            if settings.reuse_rollouts:
                found.append(_layer(self._paths.reused(number), REUSED, number, trained=True))
            if settings.fraction and (sampled or number < stage):
                found.append(_layer(self._paths.fresh(number), FRESH, number, trained=False))
        return found

    def refreshes(self, stage: int) -> bool:
        """Whether there are newer trajectories at a stage."""
        strategy = self._folder.config.select.strategy
        return stage > 0 and self._folder.config.refresh.active and strategy.follows_trajectories

    def refreshes_validation(self, stage: int) -> bool:
        """Whether the validation sets are sampled again at a stage: only if it is scored by them."""
        strategy = self._folder.config.select.strategy
        scored = strategy.aims_at_validation and strategy.scored_stage(stage) == stage
        return self._folder.config.refresh.validation and scored and self.refreshes(stage)

    @property
    def reuses(self) -> bool:
        """Whether a later stage uses the rollouts of training."""
        return self._folder.config.refresh.reuse_rollouts and self.refreshes(self._folder.config.train.stages - 1)

    def _open(self) -> Manifest:
        return open_artifact(self._folder.trajectories, "trajectories", made_by="cropi collect")


def require_signal(statuses: Sequence[str]) -> int:
    """Count the mixed groups. SignalError where there is none: there is nothing to learn from."""
    mixed = sum(status == OK for status in statuses)
    if not mixed:
        raise SignalError(
            f"none of the {len(statuses)} training prompts has both better and worse completions "
            f"({counts_text(count_status(statuses))})",
            where="prompts.train",
            fix="use problems that the policy solves sometimes, raise collect.num_generations, or see in `cropi check` "
            "how the verifier judges real completions.",
        )
    return mixed


def _layer(folder: Path, kind: str, stage: int, *, trained: bool) -> Layer:
    return Layer(folder, open_artifact(folder, kind, made_by="cropi train").identity, stage, trained)
