"""`score`: the influence of every training prompt on every validation set, at the current policy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from torch import nn

from cropi.artifacts import (
    GOLD_UNPARSEABLE,
    NON_FINITE,
    NOT_SAMPLED,
    OK,
    PROMPT_TOO_LONG,
    count_status,
    scores_schema,
    validation_scores_schema,
    write_table,
)
from cropi.config import Config, StrategyTable
from cropi.console import Progress, progress, warn
from cropi.elsewhere import Elsewhere
from cropi.errors import SignalError
from cropi.functional.surrogate import NORMALIZER_OF_LOSS
from cropi.gradients.blocks import BlockScorer, make_scorer
from cropi.gradients.candidates import candidate_groups
from cropi.gradients.directions import pieces
from cropi.gradients.evidence import validation_evidence
from cropi.gradients.groups import Group, iterate_groups
from cropi.gradients.orders import parts_elsewhere, require_parts
from cropi.gradients.parts import Parts, Row, known, make_parts
from cropi.gradients.ratios import FACTS
from cropi.gradients.scorer import Scorer
from cropi.gradients.store import keep_directions, stored_directions
from cropi.gradients.storing import FeatureRequest, rows_of_store, store_features
from cropi.gradients.surrogate import SurrogateSettings
from cropi.gradients.validation import validation_groups, warn_of_noise
from cropi.gradients.worth import drift, note_reliability
from cropi.policy import weights_identity
from cropi.world import ALONE, World

__all__ = ["FeatureRequest", "make_scorer", "score", "surrogate_settings"]


def surrogate_settings(config: Config, loss_type: str, scale_rewards: str | bool) -> SurrogateSettings:
    """The surrogate that a run's settings and its trainer's loss call for.

    Rewards scaled by the deviation of the whole batch share that divisor, which ranks like no scaling.
    """
    normalizer, std = config.score.normalizer, config.score.advantage_std
    return SurrogateSettings(
        normalizer=NORMALIZER_OF_LOSS[loss_type] if normalizer == "auto" else normalizer,
        max_completion_length=config.collect.max_completion_length,
        temperature=config.collect.temperature,
        advantage_std=scale_rewards in {"group", True} if std == "auto" else std,
        correction=config.score.correction,
        clip=config.score.clip,
        prefix_cap=config.score.prefix_cap,
        baseline=config.score.baseline,
    )


def score(
    config: Config,
    settings: SurrogateSettings,
    model: nn.Module,
    trajectories: Mapping[str, pa.Table],
    sources: Mapping[str, str],
    folder: Path,
    features: FeatureRequest,
    stage: int = 0,
    strategy: StrategyTable | None = None,
    not_sampled: Collection[str] = (),
    world: World = ALONE,
    elsewhere: Elsewhere | None = None,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write `scores.parquet` to `folder`: one row per training prompt, those without signal included (influence 0).

    `trajectories` maps "train" and "validation/NAME" to their tables, `sources` prompt ids to sources; of prompts
    without trajectories, those in `not_sampled` were never asked for any, the others are too long. With
    `score.store`, features go to a store of their own first, and the scores are read off it. Under a strategy that aims
    at candidates, halves of a sample of the training prompts take the place of the validation sets: their mean
    gradients, each scaled to length 1, and `dot`. Prompts are divided among the processes of `world`, or they are
    scored `elsewhere`. What an interruption left in `folder` is gone on with. Returns (rows by status, details), to
    the first process. Raises SignalError where a validation set has no mixed group, or nothing is finite.
    """
    if elsewhere is not None:
        require_parts(config)
    validation = _aims(config, strategy, trajectories)
    names = list(validation)
    pools = strategy is not None and strategy.pools
    standard_errors = config.score.standard_errors and not (strategy and strategy.reads_lengths)  # of no use to lengths
    rows = _blank_rows(sources, names, frozenset(not_sampled))
    mixed = sorted(_note_facts(trajectories["train"], rows))
    scorer = make_scorer(config, model, settings, strategy, world)
    work = _Work(scorer, trajectories["train"], mixed, validation, world)
    if config.score.store == "none":
        block_scorer = BlockScorer(scorer, names, standard_errors, pools)
        make = None if elsewhere is None else partial(parts_elsewhere, elsewhere, config, strategy)
        found = work.in_parts(Parts(folder, names, mixed), block_scorer, make)
    else:
        found = work.by_features(features, config.score.store)
    if strategy is None or strategy.aims_at_validation:
        warn_of_noise(scorer.direction_reliability)
    evidence, computed = validation_evidence(scorer, validation, world=world) if pools else ([], 0)
    if not world.is_main:
        return {}, {}
    if pools:
        write_table(folder / "validation.parquet", evidence, validation_scores_schema(names))
    tokens = _note_all(rows, found, validation, computed)
    counts = count_status(row["status"] for row in rows.values())
    _check_finite(counts)
    reliability = note_reliability(config, rows, names, stage) if standard_errors else None
    write_table(folder / "scores.parquet", list(rows.values()), scores_schema(names))
    Parts(folder, names, mixed).drop()
    return counts, tokens | {"reliability": reliability} | _of_scorer(scorer) | _of_rows(rows.values()) | _of_aims(
        validation
    )


def _note_all(
    rows: Mapping[str, dict[str, Any]],
    parts: Iterable[list[Row]],
    validation: Mapping[str, Sequence[Group]],
    computed: int,
) -> dict[str, int]:
    """Enter the scores of all parts; returns the tokens scored and computed, those of the validation sets included."""
    given = sum(group.completion_tokens for groups in validation.values() for group in groups)
    tokens = {"tokens": given, "tokens_computed": computed}
    for part in parts:
        _note_scores(rows, part, tokens)
    return tokens


def _aims(
    config: Config, strategy: StrategyTable | None, trajectories: Mapping[str, pa.Table]
) -> dict[str, list[Group]]:
    """The groups by whose mean gradients the pool is scored."""
    if strategy is not None and strategy.candidates_aimed_at:
        return candidate_groups(trajectories["train"], strategy.candidates_aimed_at, config.seed)
    return validation_groups(trajectories, config.score)


def _of_scorer(scorer: Scorer) -> dict[str, Any]:
    return {
        "estimator": scorer.estimator,
        "projection": scorer.projection.identity if scorer.estimator == "sketch" else None,
        "score": scorer.score,
        "normalizer": scorer.settings.normalizer,
        "direction_reliability": {name: known(value) for name, value in scorer.direction_reliability.items()},
    }


def _of_rows(rows: Collection[Mapping[str, Any]]) -> dict[str, Any]:
    return {"drift": drift(rows)}


def _of_aims(validation: Mapping[str, Sequence[Group]]) -> dict[str, Any]:
    tokens = sum(len(group.prompt_ids) + group.completion_tokens for groups in validation.values() for group in groups)
    return {
        "validation_groups": {name: len(groups) for name, groups in validation.items()},
        "validation_tokens": tokens,
    }


def _blank_rows(sources: Mapping[str, str], names: list[str], not_sampled: frozenset[str]) -> dict[str, dict[str, Any]]:
    """Rows of prompts without trajectories, by prompt id."""
    none: dict[str, Any] = {f"influence/{name}": 0.0 for name in names} | {"completion_tokens": 0, "feature_norm": 0.0}
    none |= {"pass_rate": None, "reward_variance": None, **dict.fromkeys(FACTS)}
    return {
        i: {**none, "prompt_id": i, "source": source, "status": NOT_SAMPLED if i in not_sampled else PROMPT_TOO_LONG}
        for i, source in sources.items()
    }


class _Work:
    """Scoring of the groups with a signal, in one of three ways. Each gives rows of `part_schema`, part by part."""

    def __init__(
        self,
        scorer: Scorer,
        table: pa.Table,
        prompt_ids: Sequence[str],
        validation: Mapping[str, Sequence[Group]],
        world: World,
    ) -> None:
        self._scorer, self._table, self._world = scorer, table, world
        self._prompt_ids, self._validation = prompt_ids, validation
        own = [piece for groups in validation.values() for _, piece in world.share(pieces(groups))]
        self._aimed_at = sum(map(len, own))

    def in_parts(
        self, parts: Parts, score: BlockScorer, elsewhere: Callable[..., None] | None = None
    ) -> Iterable[list[Row]]:
        """A file for every few groups, each by one process, or made elsewhere."""
        policy = weights_identity(self._scorer.model)
        self._world.from_main(lambda: parts.begin(policy))
        missing = self._world.from_main(parts.missing)
        own = sum(len(parts.ids(index)) for index in self._world.share(missing))
        with self._progress(own) as bar:
            self._scorer.aim(self._validation, bar.advance, stored_directions(parts.folder))
            if self._world.is_main:
                keep_directions(parts.folder, self._scorer.layer_directions)
            if elsewhere is not None:
                elsewhere(score, parts, self._table, missing, bar.advance)
            else:
                advancing = partial(score, advance=bar.advance)
                make_parts(parts, self._table, advancing, missing, self._scorer.lockstep(), self._world)
        return parts.rows()

    def by_features(self, request: FeatureRequest, dtype: Literal["bfloat16", "float32"]) -> Iterable[list[Row]]:
        """Features first, in shards, each by one process; the first one reads the scores off them."""
        with self._progress(len(self._world.share(self._prompt_ids))) as bar:
            self._scorer.aim(self._validation, bar.advance, stored_directions(request.folder))
            store, computed = store_features(
                request, dtype, self._scorer, self._table, self._prompt_ids, bar.advance, self._world
            )
        if store is None:
            return []
        return rows_of_store(store, self._scorer, self._table, list(self._validation), computed)

    def _progress(self, groups: int) -> AbstractContextManager[Progress]:
        return progress(self._world.titled("score"), groups + self._aimed_at, "prompts")


def _note_facts(table: pa.Table, rows: Mapping[str, dict[str, Any]]) -> list[str]:
    """Enter what is known of the prompts before any gradient; returns those that have one."""
    mixed = []
    for prompt_id, group in iterate_groups(table):
        row = rows[prompt_id]
        row["status"] = GOLD_UNPARSEABLE if group is None else group.status
        if group is not None:
            row |= {"pass_rate": group.pass_rate, "reward_variance": group.variance}
            row["completion_tokens"] = group.completion_tokens
            if group.status == OK:
                mixed.append(prompt_id)
    return mixed


def _note_scores(rows: Mapping[str, Row], part: Sequence[Row], tokens: dict[str, int]) -> None:
    """Enter what a part holds, and count its tokens."""
    for row in part:
        entered = rows[row["prompt_id"]]
        entered["status"] = row["status"]
        if row["status"] == OK:
            names = (name for name in row if name not in {"tokens", "part_tokens"})
            entered |= {name: row[name] for name in names}
        tokens["tokens"] += row["tokens"]
    tokens["tokens_computed"] += part[0]["part_tokens"] if part else 0


def _check_finite(counts: Mapping[str, int]) -> None:
    bad = counts.get(NON_FINITE, 0)
    if not bad:
        return
    if not counts.get(OK, 0):
        raise SignalError(
            "no prompt's influence is a finite number: the policy has diverged",
            where="score",
            fix="lower trainer.learning_rate or set trainer.max_grad_norm, and start the run under another name.",
        )
    warn(f"the influence of {bad} prompts is not a finite number; their status is {NON_FINITE} and they rank at 0")
