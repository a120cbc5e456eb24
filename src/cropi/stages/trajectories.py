"""A run's trajectories: those of the base policy, and those that were imported in their place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from cropi.artifacts import (
    NOT_SAMPLED,
    OK,
    PROMPT_TOO_LONG,
    TRAJECTORIES,
    Manifest,
    count_status,
    is_finished,
    open_artifact,
)
from cropi.console import counts_text
from cropi.errors import SignalError
from cropi.gradients.groups import GroupFacts, group_facts
from cropi.rollouts.shards import read_trajectories
from cropi.run_folder import RunFolder, StagePaths

IMPORTED = "imported trajectories"  # kind of artifact


class Trajectories:
    """A run's trajectories, read when they are first asked for and then kept in memory."""

    def __init__(self, folder: RunFolder, paths: StagePaths, *, mask_truncated: bool = False) -> None:
        """`mask_truncated`: as the trainer's loss has it; see `read_trajectories`."""
        self._folder, self._paths, self.mask_truncated = folder, paths, mask_truncated

    @cached_property
    def tables(self) -> dict[str, pa.Table]:
        """Trajectories by set. A training prompt with imported trajectories has only these."""
        self._open()  # checks the files
        none = {"train": TRAJECTORIES.empty_table()}  # for a strategy that collects nothing
        base = none | read_trajectories(self._folder.trajectories, mask_truncated=self.mask_truncated)
        if self._imported is None:
            return base
        imported = read_trajectories(self._paths.imported, mask_truncated=self.mask_truncated)["train"]
        return base | {"train": replaced(base["train"], imported)}

    @cached_property
    def groups(self) -> dict[str, GroupFacts]:
        """Facts of the training prompts' groups. The groups themselves need not fit into memory."""
        return group_facts(self.tables["train"])

    @cached_property
    def statuses(self) -> list[str]:
        """The status of every training prompt."""
        too_long, groups = frozenset(self._open().details["too_long"]), self.groups
        without = {True: PROMPT_TOO_LONG, False: NOT_SAMPLED}
        return [groups[i].status if i in groups else without[i in too_long] for i in self._folder.train_prompts]

    @property
    def inputs(self) -> dict[str, str]:
        """Identities of the trajectories, for the manifests of artifacts made from them."""
        inputs = {"trajectories": self._open().identity}
        if self._imported is not None:
            inputs["imported"] = self._imported.identity
        return inputs | ({"truncated": "masked"} if self.mask_truncated else {})

    @cached_property
    def _imported(self) -> Manifest | None:
        path = self._paths.imported
        return open_artifact(path, IMPORTED, made_by="cropi import") if is_finished(path) else None

    def _open(self) -> Manifest:
        return open_artifact(self._folder.trajectories, "trajectories", made_by="cropi collect")


def replaced(base: pa.Table, imported: pa.Table) -> pa.Table:
    """Replace groups of the base trajectories by imported ones. Returns a table of one chunk.

    Works column by column, so that only one column is in memory twice.
    """
    kept = pc.invert(pc.is_in(base.column("prompt_id"), value_set=imported.column("prompt_id").unique()))
    columns = [
        pa.concat_arrays([*base.column(name).filter(kept).chunks, *imported.column(name).chunks])
        for name in TRAJECTORIES.names
    ]
    return pa.table(columns, schema=TRAJECTORIES)


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
