"""`score`: the influence of every training prompt on every validation set, at the current policy."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from torch import nn

from cropi.artifacts import (
    GOLD_UNPARSEABLE,
    NON_FINITE,
    NOT_SAMPLED,
    OK,
    PROMPT_TOO_LONG,
    Manifest,
    build,
    count_status,
    is_finished,
    read_table,
    write_table,
)
from cropi.config import Config
from cropi.console import Progress, counts_text, progress, say, warn
from cropi.curriculum.stale_trajectories import drift_warning
from cropi.errors import ArtifactError, ConfigError, SignalError
from cropi.gradients.blocks import BlockScorer, make_parts_by_ray, make_scorer
from cropi.gradients.budget import BudgetSettings, budgeted
from cropi.gradients.candidates import candidate_groups
from cropi.gradients.directions import pieces
from cropi.gradients.evidence import validation_evidence
from cropi.gradients.groups import Group, iterate_groups
from cropi.gradients.parts import Parts, Row, groups_of, known, make_parts, part_rows
from cropi.gradients.ratios import FACTS
from cropi.gradients.scorer import Scored, Scorer
from cropi.gradients.store import keep_directions, stored_directions
from cropi.gradients.storing import FeatureRequest, rows_of_store, store_features
from cropi.gradients.surrogate import SurrogateSettings
from cropi.gradients.validation import validation_groups, warn_of_noise
from cropi.gradients.worth import drift, note_reliability
from cropi.parallel import process_group, ray_pool
from cropi.policy import weights_identity
from cropi.run_tables import scores_schema, validation_scores_schema
from cropi.stages.collect import make_representations
from cropi.stages.run import Run


def score(run: Run, stage: int, model: nn.Module, origin: str) -> Manifest:
    """Score all training prompts at a policy; `origin` names the policy, for the manifest."""
    strategy, paths = run.config.select.strategy, run.paths
    if strategy.pools:
        make_representations(run, "score", stage)
    prompts, inputs = run.folder.train_prompts, run.trajectories.inputs(stage)
    statuses = run.trajectories.statuses(run.trajectories.groups(run.trajectories.overlay(stage)))

    def make(folder: Path) -> tuple[Mapping[str, int], Mapping[str, Any]]:
        identities = f"{run.setup.identity} {origin}", run.setup.identity, " ".join(inputs.values())
        pool = ScoredPool(
            run.trajectories.tables(stage),
            dict(zip(prompts, prompts.column("source"), strict=True)),
            frozenset(i for i, status in zip(prompts, statuses, strict=True) if status == NOT_SAMPLED),
            FeatureRequest(paths.features(stage), *identities),
            stage,
            _previous_scores(run, stage),
        )
        with run.ledger.charge("score", stage=stage) as entry:
            counts, details = score_pool(run.config, run.surrogate, model, pool, folder)
            if process_group().is_main:
                entry["tokens"] = details["tokens"]
                entry["computed_tokens"] = details["tokens_computed"]
                entry["validation_tokens"] = details["validation_tokens"]
        return counts, details

    made_from = inputs | {"policy": origin, "settings": run.folder.settings()}
    manifest = build(paths.scores(stage), "scores", make, inputs=made_from, made_by="cropi score", **run.in_parts)
    say(f"scores of stage {stage}: {counts_text(manifest.counts)}")
    text = drift_warning(manifest.details["drift"], stage, refreshing=run.config.refresh.active)
    if text is not None:
        warn(text)
    return manifest


def read_scores(run: Run, stage: int) -> pa.Table:
    """The scores of a stage. ArtifactError where they are of other prompts than the run's."""
    folder = run.paths.scores(stage)
    names = run.config.select.strategy.directions(run.config.prompts.validation)
    table = read_table(folder / "scores.parquet", scores_schema(names))
    if table.column("prompt_id").to_pylist() != list(run.folder.train_prompts):
        raise ArtifactError("holds other prompts than the run", where=str(folder), fix="delete the run's folder.")
    return table


def _previous_scores(run: Run, stage: int) -> pa.Table | None:
    """Scores of the stage before, of the prompts whose trajectories are the same: for `score.budget.rescore`."""
    if not (run.config.score.budget.rescore and stage and is_finished(run.paths.scores(stage - 1))):
        return None
    return run.trajectories.overlay(stage).without_replaced(read_scores(run, stage - 1), stage)


@dataclass(frozen=True)
class ScoredPool:
    """The trajectories that a stage is scored by, and facts of the prompts."""

    tables: Mapping[str, pa.Table]  # "train" and "validation/NAME" -> trajectories
    sources: Mapping[str, str]  # prompt id -> source, of all training prompts
    not_sampled: Collection[str] = ()  # prompts that were never sampled; others without trajectories are too long
    features: FeatureRequest | None = None  # with `score.store`: where features go
    stage: int = 0
    previous: pa.Table | None = None  # scores of the stage before, for `score.budget.rescore`


def score_pool(
    config: Config,
    settings: SurrogateSettings,
    model: nn.Module,
    pool: ScoredPool,
    folder: Path,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write `scores.parquet` to `folder`: one row per training prompt, those without signal included (influence 0).

    With `score.store`, features are stored first, and the scores are computed from them. A strategy that aims at
    candidates takes the mean gradients of two halves of a sample of the pool in place of the validation sets, each
    scaled to length 1, and `dot`. The ranks divide the prompts, or Ray workers score them; under `score.budget`
    rank 0 scores alone. Scores that an interrupted attempt left in `folder` are kept.

    Returns (rows by status, details), to the first process. SignalError where a validation set has no mixed group, or
    nothing is finite.
    """
    if ray_pool() is not None:
        _require_parts(config)
    strategy = config.select.strategy
    validation = _aims(config, pool.tables)
    names = list(validation)
    standard_errors = config.score.standard_errors and not strategy.reads_lengths  # of no use to lengths
    rows = _blank_rows(pool.sources, names, frozenset(pool.not_sampled))
    mixed = sorted(_note_facts(pool.tables["train"], rows))
    scorer = make_scorer(config, model, settings, strategy)
    work = _Work(scorer, pool.tables["train"], mixed, validation)
    if config.score.budget.active:
        found = work.with_budget(config, pool)
    elif config.score.store == "none":
        block_scorer = BlockScorer(scorer, names, standard_errors, strategy.pools)
        found = work.in_parts(Parts(folder, names, mixed), block_scorer, config)
    else:
        assert pool.features is not None, "a store has a place"
        found = work.by_features(pool.features, config.score.store)
    if not strategy.candidates_aimed_at:
        warn_of_noise(scorer.direction_reliability)
    evidence, computed = validation_evidence(scorer, validation) if strategy.pools else ([], 0)
    if not process_group().is_main:
        return {}, {}
    if strategy.pools:
        write_table(folder / "validation.parquet", evidence, validation_scores_schema(names))
    tokens = _note_all(rows, found, validation, computed)
    counts = count_status(row["status"] for row in rows.values())
    _check_finite(counts)
    reliability = note_reliability(config, rows, names, pool.stage) if standard_errors else None
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


def _aims(config: Config, trajectories: Mapping[str, pa.Table]) -> dict[str, list[Group]]:
    """The groups whose mean gradients are the directions of influence."""
    aimed_at = config.select.strategy.candidates_aimed_at
    if aimed_at:
        return candidate_groups(trajectories["train"], aimed_at, config.seed)
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
    scored = count_status(row["scored"] for row in rows if row["scored"] is not None)
    return {"drift": drift(rows), "scored": scored}


def _of_aims(validation: Mapping[str, Sequence[Group]]) -> dict[str, Any]:
    tokens = sum(len(group.prompt_ids) + group.completion_tokens for groups in validation.values() for group in groups)
    return {
        "validation_groups": {name: len(groups) for name, groups in validation.items()},
        "validation_tokens": tokens,
    }


def _blank_rows(sources: Mapping[str, str], names: list[str], not_sampled: frozenset[str]) -> dict[str, dict[str, Any]]:
    """Rows of prompts without trajectories, by prompt id."""
    none: dict[str, Any] = {f"influence/{name}": 0.0 for name in names} | {"completion_tokens": 0, "feature_norm": 0.0}
    none |= {"pass_rate": None, "reward_variance": None, **dict.fromkeys([*FACTS, "scored"])}
    return {
        i: {**none, "prompt_id": i, "source": source, "status": NOT_SAMPLED if i in not_sampled else PROMPT_TOO_LONG}
        for i, source in sources.items()
    }


def _require_parts(config: Config) -> None:
    """ConfigError where parts of the scores depend on each other, which Ray workers cannot divide."""
    if config.score.budget.active:
        raise ConfigError(
            "which prompts are scored in full depends on the scores of the others, so Ray workers cannot divide them",
            where="score.budget",
            fix="score without --ray, or without a budget.",
        )
    if config.score.store != "none":
        raise ConfigError(
            "the feature store needs a folder that all processes share, and Ray workers share none",
            where="score.store",
            fix="score without --ray, or with score.store=none.",
        )


class _Work:
    """Scoring of the groups with a signal, in one of three ways. Each gives rows of `part_schema`, part by part."""

    def __init__(
        self,
        scorer: Scorer,
        table: pa.Table,
        prompt_ids: Sequence[str],
        validation: Mapping[str, Sequence[Group]],
    ) -> None:
        self._scorer, self._table, self._ranks = scorer, table, process_group()
        self._prompt_ids, self._validation = prompt_ids, validation
        own = [piece for groups in validation.values() for _, piece in self._ranks.share(pieces(groups))]
        self._aimed_at = sum(map(len, own))

    def in_parts(self, parts: Parts, score: BlockScorer, config: Config) -> Iterable[list[Row]]:
        """Write a file for every few groups, each by one rank or Ray worker."""
        policy = weights_identity(self._scorer.model)
        self._ranks.from_main(lambda: parts.begin(policy))
        missing = self._ranks.from_main(parts.missing)
        own = sum(len(parts.ids(index)) for index in self._ranks.share(missing))
        with self._progress(own) as bar:
            self._scorer.aim(self._validation, bar.advance, stored_directions(parts.folder))
            if self._ranks.is_main:
                keep_directions(parts.folder, self._scorer.layer_directions)
            workers = ray_pool()
            if workers is not None:
                make_parts_by_ray(workers, config, score, parts, self._table, missing, bar.advance)
            else:
                advancing = partial(score, advance=bar.advance)
                make_parts(parts, self._table, advancing, missing, self._scorer.lockstep())
        return parts.rows()

    def by_features(self, request: FeatureRequest, dtype: Literal["bfloat16", "float32"]) -> Iterable[list[Row]]:
        """Features first, in shards, each by one process; the first one reads the scores off them."""
        with self._progress(len(self._ranks.share(self._prompt_ids))) as bar:
            self._scorer.aim(self._validation, bar.advance, stored_directions(request.folder))
            store, computed = store_features(request, dtype, self._scorer, self._table, self._prompt_ids, bar.advance)
        if store is None:
            return []
        return rows_of_store(store, self._scorer, self._table, list(self._validation), computed)

    def with_budget(self, config: Config, pool: ScoredPool) -> Iterable[list[Row]]:
        """All groups at once, by the first process: which of them are scored in full depends on the others."""
        budget = config.score.budget
        settings = BudgetSettings(
            trajectories=budget.trajectories,
            contenders=budget.contenders,
            rescore=budget.rescore,
            fraction=config.select.fraction,
            kappa=config.select.fusion.kappa,
            truncate=config.select.fusion.truncate,
        )
        with self._progress(len(self._prompt_ids)) as bar:
            self._scorer.aim(self._validation, bar.advance)
            with self._scorer.lockstep():
                if not self._ranks.is_main:
                    return []
                groups = list(groups_of(self._table, self._prompt_ids))
                found = budgeted(
                    self._scorer,
                    groups,
                    settings,
                    _previous_values(pool.previous, groups),
                    seed=config.seed,
                    stage=pool.stage,
                    pool=len(pool.sources),
                    advance=bar.advance,
                )
        scored = Scored(found.values_NV, found.norms_N, found.ratio_facts_NR, None, found.tokens_computed)
        return [part_rows(groups, list(self._validation), found.values_NV, scored, found.how)]

    def _progress(self, groups: int) -> AbstractContextManager[Progress]:
        return progress(self._ranks.titled("score"), groups + self._aimed_at, "prompts")


def _previous_values(previous: pa.Table | None, groups: Sequence[Group]) -> np.ndarray | None:
    """Influence of the groups in the scores of another stage; NaN where they have none there."""
    if previous is None:
        return None
    names = [name for name in previous.column_names if name.startswith("influence/")]
    known = {row["prompt_id"]: [row[name] for name in names] for row in previous.to_pylist() if row["status"] == OK}
    return np.array([known.get(group.prompt_id, [np.nan] * len(names)) for group in groups])


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
        entered |= {"status": row["status"], "scored": row["scored"]}
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
