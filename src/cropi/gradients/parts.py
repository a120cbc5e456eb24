"""Scores in parts: a file for every few groups, made by one process, so that an interruption costs a part and no more.

A part depends on the policy and on what it is scored by, not on who makes it: a process of this run, or a job elsewhere
that writes the same rows to the same file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cropi.artifacts import OK, read_table, wait_for_files, write_json, write_table
from cropi.errors import ArtifactError
from cropi.gradients.groups import Group, iterate_groups
from cropi.gradients.influence import statuses
from cropi.gradients.ratios import FACTS
from cropi.gradients.scorer import Scored
from cropi.gradients.store import DIRECTIONS
from cropi.world import World

PART = 64  # groups: few enough to be divided among many processes, enough to fill packs

Row = dict[str, Any]


def part_schema(names: Sequence[str]) -> pa.Schema:
    """Columns of a part: those of the scores that come from gradients, and tokens."""
    numbers = ["feature_norm", *FACTS, *(f"influence/{n}" for n in names), *(f"standard_error/{n}" for n in names)]
    return pa.schema(
        [
            ("prompt_id", pa.string()),
            ("status", pa.string()),
            *((name, pa.float64()) for name in numbers),  # null where it is not known or not finite
            ("tokens", pa.int64()),  # of the group, its prompt once for each completion
            ("part_tokens", pa.int64()),  # computed for the whole part, the same in every row
        ]
    )


def part_rows(groups: Sequence[Group], names: Sequence[str], values_NV: np.ndarray, scored: Scored) -> list[Row]:
    """Rows of `part_schema` of groups with a signal; only those with finite influence have numbers."""
    rows = []
    blank: Row = dict.fromkeys(part_schema(names).names)
    for index, (group, status) in enumerate(zip(groups, statuses(groups, values_NV), strict=True)):
        row = blank | {"prompt_id": group.prompt_id, "status": status}
        row["tokens"] = len(group.prompt_ids) * len(group.completions) + group.completion_tokens
        row["part_tokens"] = scored.tokens_computed
        if status == OK:
            row |= {f"influence/{name}": float(values_NV[index, v]) for v, name in enumerate(names)}
            row["feature_norm"] = known(scored.norms_N[index])
            row |= dict(zip(FACTS, map(known, scored.ratio_facts_NR[index]), strict=True))
            if scored.errors_NV is not None:
                errors_V = map(known, scored.errors_NV[index])
                row |= {f"standard_error/{name}": error for name, error in zip(names, errors_V, strict=True)}
        rows.append(row)
    return rows


def known(value: float) -> float | None:
    """A finite number, or None."""
    return float(value) if np.isfinite(value) else None


@dataclass(frozen=True)
class Parts:
    """The parts of a stage's scores, `part-NNNNN.parquet` in their folder until the scores are whole."""

    folder: Path
    names: Sequence[str]  # of the validation sets
    prompt_ids: Sequence[str]  # of all groups with a signal, ascending

    def begin(self, policy: str) -> None:
        """Keep the parts of an earlier attempt if they are of the same policy, an identity of its weights."""
        mark = self.folder / "parts.json"
        try:
            same = json.loads(mark.read_text(encoding="utf-8")) == {"policy": policy}
        except (OSError, ValueError):
            same = False
        if not same:
            self.drop()
            write_json(mark, {"policy": policy})

    def ids(self, index: int) -> Sequence[str]:
        """The prompts of a part."""
        return self.prompt_ids[index * PART : (index + 1) * PART]

    def missing(self) -> list[int]:
        """The parts that are still to be made."""
        return [index for index in range(self._count) if not self._path(index).is_file()]

    def make(self, index: int, groups: Sequence[Group], score: Callable[[Sequence[Group]], list[Row]]) -> None:
        """Score the groups of a part and write it."""
        self.keep(index, score(groups))

    def keep(self, index: int, rows: Sequence[Row]) -> None:
        """Write the rows of a part."""
        if [row["prompt_id"] for row in rows] != list(self.ids(index)):
            raise ValueError(f"part {index} is of other prompts")
        write_table(self._path(index), rows, part_schema(self.names))

    def rows(self) -> Iterator[list[Row]]:
        """The rows of every part in turn."""
        wait_for_files(map(self._path, range(self._count)))
        for index in range(self._count):
            rows = read_table(self._path(index), part_schema(self.names)).to_pylist()
            if [row["prompt_id"] for row in rows] != list(self.ids(index)):
                path = self._path(index)
                raise ArtifactError("holds other prompts", where=str(path), fix=f"delete {path} and run again.")
            yield rows

    def drop(self) -> None:
        """Remove what only an unfinished scoring needs."""
        for path in (*self.folder.glob("part-*.parquet"), self.folder / "parts.json", self.folder / DIRECTIONS):
            path.unlink(missing_ok=True)

    @property
    def _count(self) -> int:
        return -(-len(self.prompt_ids) // PART)

    def _path(self, index: int) -> Path:
        return self.folder / f"part-{index:05}.parquet"


def make_parts(
    parts: Parts,
    table: pa.Table,
    score: Callable[[Sequence[Group]], list[Row]],
    missing: Sequence[int],
    lockstep: AbstractContextManager[None],
    world: World,
) -> None:
    """Score this process's share of the missing parts, inside `lockstep`, and go on when all processes have."""
    own = world.share(missing)
    groups = groups_of(table, [prompt_id for index in own for prompt_id in parts.ids(index)])
    with lockstep:
        for index in own:
            parts.make(index, list(islice(groups, len(parts.ids(index)))), score)
    world.barrier()


def groups_of(table: pa.Table, prompt_ids: Sequence[str]) -> Iterator[Group]:
    """The groups of some prompts of a table, which are given in ascending order."""
    wanted = table.filter(pc.is_in(table.column("prompt_id"), value_set=pa.array(list(prompt_ids), pa.string())))
    return (group for _, group in iterate_groups(wanted) if group is not None)
