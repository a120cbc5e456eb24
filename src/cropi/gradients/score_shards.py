"""Shard files of a stage's scores.

One process scores and writes a shard, so an interruption costs at most one shard per process. A shard depends on the
policy and the validation sets, not on the process that makes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import nn

from cropi.artifacts import OK, read_table, wait_for_files, write_json, write_table
from cropi.config import Config, StrategyTable
from cropi.errors import ArtifactError
from cropi.functional.projection import projection_of
from cropi.gradients.group_influence import statuses
from cropi.gradients.groups import RATIO_COLUMNS, Group, SurrogateSettings, iterate_groups
from cropi.gradients.influence_scorer import Aim, Scorer, ScorerOptions, score_by_halves, scorer_of
from cropi.parallel import process_group
from cropi.policy import PolicyCopy
from cropi.ray_workers import Perform, RayPool, Task

SHARD_PROMPTS = 64  # few enough to divide among many processes, enough to fill packs

Row = dict[str, Any]


def shard_schema(names: Sequence[str]) -> pa.Schema:
    """Columns of a shard: the score columns that come from gradients, and tokens."""
    influence = [f"{column}/{name}" for column in ("influence", "standard_error") for name in names]
    numbers = ["feature_norm", *RATIO_COLUMNS, *influence]
    return pa.schema(
        [
            ("prompt_id", pa.string()),
            ("status", pa.string()),
            *((name, pa.float64()) for name in numbers),  # null if unknown or not finite
            ("tokens", pa.int64()),  # of the group, with the prompt counted for each completion
            ("shard_tokens", pa.int64()),  # computed for the whole shard, the same in every row
        ]
    )


def finite_or_none(value: float) -> float | None:
    """Return a finite number, or None."""
    return float(value) if np.isfinite(value) else None


def make_scorer(
    config: Config, model: nn.Module, settings: SurrogateSettings, strategy: StrategyTable | None = None
) -> Scorer:
    """Make the scorer for a config; a strategy that compares with candidates needs normalised means and `dot`."""
    aims_at_candidates = strategy is not None and strategy.candidates_aimed_at > 0
    options = ScorerOptions(
        estimator=config.score.estimator,
        score="dot" if aims_at_candidates else config.score.score,
        validation_mean="normalized" if aims_at_candidates else "plain",
        projection=projection_of(config.score.mask),
        batch_tokens=config.score.batch_tokens,
        lengths=strategy is not None and strategy.reads_lengths,
    )
    return scorer_of(model, settings, options)


@dataclass(frozen=True)
class BlockScorer:
    """A scorer with directions, and how to score a block of groups with it."""

    scorer: Scorer
    names: Sequence[str]  # of the validation sets
    standard_errors: bool

    def __call__(self, block: Sequence[Group], advance: Callable[[int], None] | None = None) -> list[Row]:
        """Return rows of `shard_schema` of groups with signal; only those with finite influence have numbers."""
        score = partial(score_by_halves, self.scorer) if self.standard_errors else self.scorer
        scored = score(block, advance=advance)
        values_NV, rows = self.scorer.values(scored), []
        blank: Row = dict.fromkeys(shard_schema(self.names).names)
        for index, (group, status) in enumerate(zip(block, statuses(block, values_NV), strict=True)):
            row = blank | {"prompt_id": group.prompt_id, "status": status, "shard_tokens": scored.tokens_computed}
            row["tokens"] = len(group.prompt_ids) * len(group.completions) + group.completion_tokens
            if status == OK:
                row |= {f"influence/{name}": float(values_NV[index, v]) for v, name in enumerate(self.names)}
                row["feature_norm"] = finite_or_none(scored.norms_N[index])
                row |= dict(zip(RATIO_COLUMNS, map(finite_or_none, scored.ratios[index].columns), strict=True))
                if scored.errors_NV is not None:
                    errors_V = map(finite_or_none, scored.errors_NV[index])
                    row |= {f"standard_error/{name}": error for name, error in zip(self.names, errors_V, strict=True)}
            rows.append(row)
        return rows


@dataclass(frozen=True)
class ScoreShards:
    """The shards of a stage's scores, `part-NNNNN.parquet` until the scores are complete."""

    folder: Path
    names: Sequence[str]  # of the validation sets
    prompt_ids: Sequence[str]  # of all groups with signal, ascending

    def begin(self, policy: str) -> None:
        """Keep the shards of an earlier attempt with the same policy, `policy` being an identity of its weights."""
        mark = self.folder / "shards.json"
        try:
            same = json.loads(mark.read_text(encoding="utf-8")) == {"policy": policy}
        except (OSError, ValueError):
            same = False
        if not same:
            self.remove()
            write_json(mark, {"policy": policy})

    def ids(self, index: int) -> Sequence[str]:
        """Return the prompts of a shard."""
        return self.prompt_ids[index * SHARD_PROMPTS : (index + 1) * SHARD_PROMPTS]

    def missing(self) -> list[int]:
        """Return the shards still to be made."""
        return [index for index in range(self._count) if not self._path(index).is_file()]

    def write(self, index: int, rows: Sequence[Row]) -> None:
        """Write the rows of a shard."""
        write_table(self._path(index), rows, shard_schema(self.names))

    def rows(self) -> Iterator[list[Row]]:
        """Read the rows of every shard in turn."""
        wait_for_files(map(self._path, range(self._count)))
        for index in range(self._count):
            path = self._path(index)
            rows = read_table(path, shard_schema(self.names)).to_pylist()
            if [row["prompt_id"] for row in rows] != list(self.ids(index)):
                raise ArtifactError("holds other prompts", where=str(path), fix=f"delete {path} and run again.")
            yield rows

    def remove(self) -> None:
        """Remove the files that only an unfinished scoring needs."""
        for path in (*self.folder.glob("part-*.parquet"), self.folder / "shards.json"):
            path.unlink(missing_ok=True)

    @property
    def _count(self) -> int:
        return -(-len(self.prompt_ids) // SHARD_PROMPTS)

    def _path(self, index: int) -> Path:
        return self.folder / f"part-{index:05}.parquet"


def score_missing_shards(
    shards: ScoreShards,
    table: pa.Table,
    score: Callable[[Sequence[Group]], list[Row]],
    missing: Sequence[int],
    lockstep: AbstractContextManager[None],
) -> None:
    """Score this rank's share of the missing shards inside `lockstep`, then wait for the other ranks."""
    ranks = process_group()
    own = ranks.share(missing)
    prompt_ids = pa.array([prompt_id for index in own for prompt_id in shards.ids(index)], pa.string())
    wanted = table.filter(pc.is_in(table.column("prompt_id"), value_set=prompt_ids))
    groups = (group for _, group in iterate_groups(wanted) if group is not None)
    with lockstep:
        for index in own:
            shards.write(index, score(list(islice(groups, len(shards.ids(index))))))
    ranks.barrier()


@dataclass(frozen=True)
class ScoreJob:
    """Scoring of shards by a Ray worker, with the directions of this process."""

    config: Config
    policy: PolicyCopy
    settings: SurrogateSettings
    strategy: StrategyTable | None
    aim: Aim
    names: Sequence[str]
    standard_errors: bool

    def start(self) -> Perform:
        """Load the policy and take over the directions."""
        scorer = make_scorer(self.config, self.policy.load().model, self.settings, self.strategy)
        scorer.aim_as(self.aim)
        score = BlockScorer(scorer, self.names, self.standard_errors)

        def perform(task: Task) -> Task:
            groups = [group for _, group in iterate_groups(task.rows) if group is not None]
            return Task(task.index, pa.Table.from_pylist(score(groups), schema=shard_schema(self.names)), {})

        return perform


def score_shards_by_ray(
    pool: RayPool,
    config: Config,
    strategy: StrategyTable | None,
    score: BlockScorer,
    shards: ScoreShards,
    table: pa.Table,
    missing: Sequence[int],
    advance: Callable[[int], None],
) -> None:
    """Have Ray workers score the missing shards, and write each as it comes back."""
    if not missing:
        return  # no cluster is needed
    scorer = score.scorer
    policy = PolicyCopy.of(config.policy, scorer.model, trained=True)
    job = ScoreJob(config, policy, scorer.settings, strategy, scorer.aimed, score.names, score.standard_errors)
    with closing(pool.map(job, _tasks(shards, table, missing))) as made:
        for task in made:
            shards.write(task.index, task.rows.to_pylist())
            advance(len(shards.ids(task.index)))


def _tasks(shards: ScoreShards, table: pa.Table, missing: Sequence[int]) -> Iterator[Task]:
    """Make a task for each missing shard, with its trajectories."""
    place = pc.index_in(table.column("prompt_id"), value_set=pa.array(list(shards.prompt_ids), pa.string()))
    shard_of_row = pc.fill_null(place, -1).to_numpy() // SHARD_PROMPTS
    order = np.argsort(shard_of_row, kind="stable")
    for index in missing:
        first, last = np.searchsorted(shard_of_row, [index, index + 1], sorter=order)
        yield Task(index, table.take(pa.array(order[first:last])), {})
