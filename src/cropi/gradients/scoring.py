"""`score`: the influence of every training prompt on every validation set, at the current policy."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
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
from cropi.errors import SignalError
from cropi.functional.influence import gain
from cropi.functional.projection import SparseProjection
from cropi.functional.surrogate import NORMALIZER_OF_LOSS
from cropi.gradients.budget import BudgetSettings, budgeted
from cropi.gradients.candidates import candidate_groups
from cropi.gradients.evidence import validation_evidence
from cropi.gradients.groups import Group, iterate_groups
from cropi.gradients.halves import score_by_halves
from cropi.gradients.influence import statuses
from cropi.gradients.ratios import FACTS
from cropi.gradients.scorer import BLOCK, Scored, Scorer
from cropi.gradients.store import FeatureStoreWriter, StoreIdentity, directions_digest, stored_directions
from cropi.gradients.surrogate import SurrogateSettings
from cropi.gradients.validation import validation_groups, warn_of_noise
from cropi.gradients.worth import drift, note_reliability


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


@dataclass(frozen=True)
class FeatureRequest:
    """Where a stage's features go if they are kept, and the identities of what they are made from."""

    folder: Path
    policy: str
    tokenizer: str
    trajectories: str


def make_scorer(
    config: Config, model: nn.Module, settings: SurrogateSettings, strategy: StrategyTable | None = None
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


def score(
    config: Config,
    settings: SurrogateSettings,
    model: nn.Module,
    trajectories: Mapping[str, pa.Table],
    sources: Mapping[str, str],
    folder: Path,
    features: FeatureRequest,
    previous: pa.Table | None = None,
    stage: int = 0,
    strategy: StrategyTable | None = None,
    not_sampled: Collection[str] = (),
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write `scores.parquet` to `folder`: one row per training prompt, those without signal included (influence 0).

    `trajectories` maps "train" and "validation/NAME" to their tables, `sources` prompt ids to sources; of prompts
    without trajectories, those in `not_sampled` were never asked for any, the others are too long. With
    `score.store`, features go to a store of their own first, and the scores are read off it. `previous` are the scores
    of the stage before, for `score.budget.rescore`. Under a strategy that aims at candidates, halves of a sample of the
    training prompts take the place of the validation sets: their mean gradients, each scaled to length 1, and `dot`.
    Returns (rows by status, details). Raises SignalError where a validation set has no mixed group, or nothing is
    finite.
    """
    validation = _aims(config, strategy, trajectories)
    names = list(validation)
    pools = strategy is not None and strategy.pools
    standard_errors = config.score.standard_errors and not (strategy and strategy.reads_lengths)  # of no use to lengths
    rows = _blank_rows(sources, names, frozenset(not_sampled))
    mixed = _note_facts(trajectories["train"], rows)
    scorer = make_scorer(config, model, settings, strategy)
    given = computed = 0
    with progress("score", len(mixed) + sum(map(len, validation.values())), "prompts") as bar:
        if config.score.budget.active:
            scorer.aim(validation, bar.advance)
            parts = _score_with_budget(config, scorer, trajectories["train"], len(sources), previous, stage, bar)
        elif config.score.store == "none":
            scorer.aim(validation, bar.advance)
            parts = _score_blocks(scorer, trajectories["train"], standard_errors, pools, bar)
        else:
            scorer.aim(validation, bar.advance, stored_directions(features.folder))
            writer = _writer(config, settings, scorer, features, mixed)
            parts = _score_into_store(writer, scorer, trajectories["train"], bar)
        if strategy is None or strategy.aims_at_validation:
            warn_of_noise(scorer.direction_reliability)
        if pools:
            evidence, computed = validation_evidence(scorer, validation)
            write_table(folder / "validation.parquet", evidence, validation_scores_schema(names))
        for part in parts:
            _note_scores(rows, part, names)
            given += sum(len(g.prompt_ids) * len(g.completions) + g.completion_tokens for g in part.groups)
            computed += part.tokens_computed
    given += sum(group.completion_tokens for groups in validation.values() for group in groups)
    counts = count_status(row["status"] for row in rows.values())
    _check_finite(counts)
    reliability = note_reliability(config, rows, names, stage) if standard_errors else None
    write_table(folder / "scores.parquet", list(rows.values()), scores_schema(names))
    found = {"tokens": given, "tokens_computed": computed, "reliability": reliability}
    return counts, found | _of_scorer(scorer) | _of_rows(rows.values()) | _of_aims(validation)


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
        "direction_reliability": {name: _known(value) for name, value in scorer.direction_reliability.items()},
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
    none |= {"pass_rate": None, **dict.fromkeys([*FACTS, "scored"])}
    return {
        i: {**none, "prompt_id": i, "source": source, "status": NOT_SAMPLED if i in not_sampled else PROMPT_TOO_LONG}
        for i, source in sources.items()
    }


@dataclass(frozen=True)
class _Part:
    """Scores of some groups, in their order."""

    groups: Sequence[Group]
    values_NV: np.ndarray
    norms_N: np.ndarray
    ratio_facts_NR: np.ndarray
    how: Sequence[str]
    tokens_computed: int
    errors_NV: np.ndarray | None = None


def _score_blocks(
    scorer: Scorer, table: pa.Table, standard_errors: bool, pools: bool, bar: Progress
) -> Iterator[_Part]:
    groups = _mixed(table)
    while block := list(islice(groups, BLOCK)):
        if pools and not standard_errors:
            scored = score_by_halves(scorer, block, bar.advance)
        else:
            scored = scorer(block, standard_errors=standard_errors, advance=bar.advance)
        values_NV, how = scorer.values(scored), ["full"] * len(block)
        yield _Part(
            block, values_NV, scored.norms_N, scored.ratio_facts_NR, how, scored.tokens_computed, scored.errors_NV
        )


def _score_with_budget(
    config: Config,
    scorer: Scorer,
    table: pa.Table,
    pool: int,
    previous: pa.Table | None,
    stage: int,
    bar: Progress,
) -> Iterator[_Part]:
    """All groups at once: which of them are scored in full depends on the others."""
    groups, budget = list(_mixed(table)), config.score.budget
    settings = BudgetSettings(
        trajectories=budget.trajectories,
        contenders=budget.contenders,
        rescore=budget.rescore,
        fraction=config.select.fraction,
        kappa=config.select.fusion.kappa,
        truncate=config.select.fusion.truncate,
    )
    known = _previous_values(previous, groups)
    found = budgeted(scorer, groups, settings, known, seed=config.seed, stage=stage, pool=pool, advance=bar.advance)
    yield _Part(groups, found.values_NV, found.norms_N, found.ratio_facts_NR, found.how, found.tokens_computed)


def _previous_values(previous: pa.Table | None, groups: Sequence[Group]) -> np.ndarray | None:
    """Influence of the groups in the scores of another stage; NaN where they have none there."""
    if previous is None:
        return None
    names = [name for name in previous.column_names if name.startswith("influence/")]
    known = {row["prompt_id"]: [row[name] for name in names] for row in previous.to_pylist() if row["status"] == OK}
    return np.array([known.get(group.prompt_id, [np.nan] * len(names)) for group in groups])


def _writer(
    config: Config, settings: SurrogateSettings, scorer: Scorer, features: FeatureRequest, prompt_ids: list[str]
) -> FeatureStoreWriter:
    assert config.score.store != "none"
    identity = StoreIdentity(
        projection=scorer.projection.identity,
        directions=directions_digest(scorer.layer_directions),
        policy=features.policy,
        tokenizer=features.tokenizer,
        trajectories=features.trajectories,
        dtype=config.score.store,
        dim=scorer.projection.dim,
        **asdict(settings),
    )
    return FeatureStoreWriter(features.folder, identity, prompt_ids, BLOCK, scorer.layer_directions)


def _score_into_store(writer: FeatureStoreWriter, scorer: Scorer, table: pa.Table, bar: Progress) -> Iterator[_Part]:
    """Write the shards that are missing; then read all scores off the store, so that a resumed run has the same."""
    missing, computed = set(writer.missing()), []
    groups = _mixed(table)
    for index, block in enumerate(iter(lambda: list(islice(groups, BLOCK)), [])):
        if index not in missing:
            bar.advance(len(block))
            computed.append(0)
            continue
        scored = scorer(block, advance=bar.advance)
        assert scored.features_ND is not None
        writer.write_shard(index, scored.features_ND, _feature_rows(block, scored))
        computed.append(scored.tokens_computed)
    store = writer.finish()
    values_NV = store.influence(scorer.features_VD) if scorer.score == "dot" else store.cosine(scorer.features_VD)
    if scorer.score == "gain":
        values_NV = gain(values_NV, np.array([group.pass_rate for group in _mixed(table)]))
    facts = store.rows()
    norms_N = facts.column("norm").to_numpy()
    facts_NR = np.stack([facts.column(name).to_numpy() for name in FACTS], axis=1)
    groups = _mixed(table)
    for index, tokens in enumerate(computed):
        part = slice(index * BLOCK, (index + 1) * BLOCK)
        block = list(islice(groups, BLOCK))
        yield _Part(block, values_NV[part], norms_N[part], facts_NR[part], ["full"] * len(block), tokens)


def _feature_rows(groups: Sequence[Group], scored: Scored) -> list[dict[str, Any]]:
    found = statuses(groups, scored.products_NV)
    return [
        {
            "prompt_id": group.prompt_id,
            "status": found[n],
            "norm": float(scored.norms_N[n]),
            **dict(zip(FACTS, scored.ratio_facts_NR[n].tolist(), strict=True)),
            "tokens": group.completion_tokens,
        }
        for n, group in enumerate(groups)
    ]


def _note_facts(table: pa.Table, rows: Mapping[str, dict[str, Any]]) -> list[str]:
    """Enter what is known of the prompts before any gradient; returns those that have one."""
    mixed = []
    for prompt_id, group in iterate_groups(table):
        row = rows[prompt_id]
        row["status"] = GOLD_UNPARSEABLE if group is None else group.status
        if group is not None:
            row |= {"pass_rate": group.pass_rate, "completion_tokens": group.completion_tokens}
            if group.status == OK:
                mixed.append(prompt_id)
    return mixed


def _mixed(table: pa.Table) -> Iterator[Group]:
    return (group for _, group in iterate_groups(table) if group is not None and group.status == OK)


def _note_scores(rows: Mapping[str, dict[str, Any]], part: _Part, names: list[str]) -> None:
    found = statuses(part.groups, part.values_NV)
    for index, (group, status, how) in enumerate(zip(part.groups, found, part.how, strict=True)):
        row = rows[group.prompt_id]
        row |= {"status": status, "scored": how}
        if status == OK:
            row |= {f"influence/{name}": float(part.values_NV[index, v]) for v, name in enumerate(names)}
            row["feature_norm"] = _known(part.norms_N[index])
            row |= dict(zip(FACTS, map(_known, part.ratio_facts_NR[index]), strict=True))
            if part.errors_NV is not None:
                errors_V = map(_known, part.errors_NV[index])
                row |= {f"standard_error/{name}": error for name, error in zip(names, errors_V, strict=True)}


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


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
