"""ScoreShards of the scores that workers elsewhere make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cropi.config import Config
from cropi.elsewhere import CarriedPolicy, Elsewhere, Packed, pack_tensors, unpack_tensors
from cropi.errors import ConfigError
from cropi.gradients.groups import iterate_groups
from cropi.gradients.influence_scorer import Aim
from cropi.gradients.score_shards import SHARD_PROMPTS, BlockScorer, ScoreShards, make_scorer, shard_schema
from cropi.gradients.surrogate_weights import SurrogateSettings
from cropi.workers import Make, Unit


@dataclass(frozen=True)
class PackedAim:
    """`Aim` on its way."""

    directions: Sequence[Packed]
    layer_directions: Packed
    features: Packed
    norms_V: np.ndarray

    @classmethod
    def of(cls, aim: Aim) -> PackedAim:
        features = {} if aim.features_VD is None else {"features": aim.features_VD}
        dense = [pack_tensors(direction) for direction in aim.directions]
        return cls(dense, pack_tensors(aim.layer_directions), pack_tensors(features), aim.norms_V)

    def unpacked(self) -> Aim:
        features_VD = unpack_tensors(self.features).get("features")
        dense = [unpack_tensors(direction) for direction in self.directions]
        return Aim(dense, unpack_tensors(self.layer_directions), features_VD, self.norms_V)


@dataclass(frozen=True)
class ScoreOrder:
    """To score groups at the policy that it carries, by the directions that it carries."""

    config: dict[str, Any]
    policy: CarriedPolicy
    settings: SurrogateSettings
    aim: PackedAim
    names: Sequence[str]
    standard_errors: bool

    def begin(self) -> Make:
        model = self.policy.load().model
        config = Config.model_validate(self.config)
        scorer = make_scorer(config, model, self.settings, config.select.strategy)
        scorer.aim_as(self.aim.unpacked())
        score = BlockScorer(scorer, self.names, self.standard_errors)

        def make(unit: Unit) -> Unit:
            groups = [group for _, group in iterate_groups(unit.rows) if group is not None]
            return Unit(unit.index, pa.Table.from_pylist(score(groups)[0], schema=shard_schema(self.names)), {})

        return make


def parts_elsewhere(
    elsewhere: Elsewhere,
    config: Config,
    score: BlockScorer,
    parts: ScoreShards,
    table: pa.Table,
    missing: Sequence[int],
    advance: Callable[[int], None],
) -> None:
    """Have parts made by workers that aim as `score` does, and write each as it comes back."""
    if not missing:
        return  # no cluster is needed
    order = ScoreOrder(
        config.resolved(),
        elsewhere.policy,
        score.scorer.settings,
        PackedAim.of(score.scorer.aimed),
        score.names,
        score.standard_errors,
    )
    with closing(elsewhere.workers.each(order, _units(parts, table, missing))) as made:
        for unit in made:
            parts.write(unit.index, unit.rows.to_pylist())
            advance(len(parts.ids(unit.index)))


def _units(parts: ScoreShards, table: pa.Table, missing: Sequence[int]) -> Iterator[Unit]:
    """The trajectories of each part in turn."""
    place = pc.index_in(table.column("prompt_id"), value_set=pa.array(list(parts.prompt_ids), pa.string()))
    part_of_row = pc.fill_null(place, -1).to_numpy() // SHARD_PROMPTS
    order = np.argsort(part_of_row, kind="stable")
    for index in missing:
        first, last = np.searchsorted(part_of_row, [index, index + 1], sorter=order)
        yield Unit(index, table.take(pa.array(order[first:last])), {})


def require_parts(config: Config) -> None:
    """ConfigError where scores are not made in parts that need nothing of each other."""
    if config.score.store != "none":
        raise ConfigError(
            "the feature store is written by processes that share its folder, which workers elsewhere do not",
            where="score.store",
            fix="score without --ray, or with score.store=none.",
        )
