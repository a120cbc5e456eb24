"""How a config wants groups scored: one scorer, and rows of a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import nn

from cropi.config import Config, StrategyTable
from cropi.functional.projection import SparseProjection
from cropi.gradients.groups import Group, iterate_groups
from cropi.gradients.halves import score_by_halves
from cropi.gradients.parts import PART, Parts, Row, part_rows, part_schema
from cropi.gradients.scorer import Aim, Scorer
from cropi.gradients.surrogate import SurrogateSettings
from cropi.parallel import Perform, RayPool, Task
from cropi.policy_copy import PolicyCopy


def make_scorer(
    config: Config,
    model: nn.Module,
    settings: SurrogateSettings,
    strategy: StrategyTable | None = None,
) -> Scorer:
    """The scorer that a config asks for; for a strategy that aims at candidates, the one that it needs."""
    aims_at_candidates = strategy is not None and strategy.candidates_aimed_at > 0
    return Scorer(
        model,
        settings,
        estimator=config.score.estimator,
        score="dot" if aims_at_candidates else config.score.score,
        validation_mean="normalized" if aims_at_candidates else config.score.validation_mean,
        lengths=strategy is not None and strategy.reads_lengths,
        projection=SparseProjection(**config.score.projection.model_dump()),
        batch_tokens=config.score.batch_tokens,
    )


@dataclass(frozen=True)
class BlockScorer:
    """A scorer that has been aimed, and what is asked of it."""

    scorer: Scorer
    names: Sequence[str]  # of the validation sets
    standard_errors: bool
    pools: bool

    def __call__(self, block: Sequence[Group], advance: Callable[[int], None] | None = None) -> list[Row]:
        """Rows of `part_schema` of some groups with a signal."""
        if self.pools and not self.standard_errors:
            scored = score_by_halves(self.scorer, block, advance)
        else:
            scored = self.scorer(block, standard_errors=self.standard_errors, advance=advance)
        return part_rows(block, self.names, self.scorer.values(scored), scored, ["full"] * len(block))


@dataclass(frozen=True)
class ScoreJob:
    """Scoring of parts by a Ray worker, with the directions that this process made."""

    config: Config
    policy: PolicyCopy
    settings: SurrogateSettings
    aim: Aim
    names: Sequence[str]
    standard_errors: bool
    pools: bool

    def start(self) -> Perform:
        """Load the policy and aim at the directions."""
        scorer = make_scorer(self.config, self.policy.load().model, self.settings, self.config.select.strategy)
        scorer.aim_as(self.aim)
        score = BlockScorer(scorer, self.names, self.standard_errors, self.pools)

        def perform(task: Task) -> Task:
            groups = [group for _, group in iterate_groups(task.rows) if group is not None]
            return Task(task.index, pa.Table.from_pylist(score(groups), schema=part_schema(self.names)), {})

        return perform


def make_parts_by_ray(
    pool: RayPool,
    config: Config,
    score: BlockScorer,
    parts: Parts,
    table: pa.Table,
    missing: Sequence[int],
    advance: Callable[[int], None],
) -> None:
    """Have Ray workers score the missing parts, and write each as it comes back."""
    if not missing:
        return  # no cluster is needed
    scorer = score.scorer
    policy = PolicyCopy.of(config.policy, scorer.model, trained=True)
    job = ScoreJob(config, policy, scorer.settings, scorer.aimed, score.names, score.standard_errors, score.pools)
    with closing(pool.map(job, _tasks(parts, table, missing))) as made:
        for task in made:
            parts.keep(task.index, task.rows.to_pylist())
            advance(len(parts.ids(task.index)))


def _tasks(parts: Parts, table: pa.Table, missing: Sequence[int]) -> Iterator[Task]:
    """A task for each missing part, with its trajectories."""
    place = pc.index_in(table.column("prompt_id"), value_set=pa.array(list(parts.prompt_ids), pa.string()))
    part_of_row = pc.fill_null(place, -1).to_numpy() // PART
    order = np.argsort(part_of_row, kind="stable")
    for index in missing:
        first, last = np.searchsorted(part_of_row, [index, index + 1], sorter=order)
        yield Task(index, table.take(pa.array(order[first:last])), {})
