"""The score stage: influence of every training prompt on every validation set, at the current policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from cropi.artifacts import (
    GOLD_UNPARSEABLE,
    NON_FINITE,
    OK,
    PROMPT_TOO_LONG,
    Manifest,
    build,
    count_status,
    read_table,
    write_table,
)
from cropi.config import Config
from cropi.console import counts_text, progress, say, warn
from cropi.errors import ArtifactError, SignalError
from cropi.functional.ranking import (
    ranks,
    reciprocal_rank_fusion,
    reliability,
    selection_size,
    shrunk,
    top_probabilities,
)
from cropi.gradients.groups import RATIO_COLUMNS, Group, SurrogateSettings, iterate_groups
from cropi.gradients.influence_scorer import Scorer
from cropi.gradients.score_shards import (
    BlockScorer,
    Row,
    ScoreShards,
    finite_or_none,
    make_scorer,
    score_missing_shards,
    score_shards_by_ray,
)
from cropi.gradients.validation_directions import candidate_groups, pieces, validation_groups, warn_of_noise
from cropi.parallel import process_group
from cropi.policy import weights_identity
from cropi.ray_workers import ray_pool
from cropi.run_tables import scores_schema
from cropi.seeds import derived_seed
from cropi.stages.run import Run


def score(run: Run, stage: int, model: nn.Module, origin: str) -> Manifest:
    """Score all training prompts at a policy; `origin` names the policy, for the manifest."""
    run.require_trajectories()
    prompts = run.folder.train_prompts

    def make(folder: Path) -> tuple[Mapping[str, int], Mapping[str, Any]]:
        pool = ScoredPool(run.trajectories.tables, dict(zip(prompts, prompts.column("source"), strict=True)), stage)
        with run.ledger.charge("score", stage=stage) as entry:
            counts, details = score_pool(run.config, run.surrogate, model, pool, folder)
            if process_group().is_main:
                entry["tokens"] = details["tokens"]
                entry["computed_tokens"] = details["tokens_computed"]
                entry["validation_tokens"] = details["validation_tokens"]
                entry["estimator"] = details["estimator"]
        return counts, details

    made_from = run.trajectories.inputs | {"policy": origin, "settings": run.folder.settings()}
    manifest = build(
        run.paths.scores(stage), "scores", make, inputs=made_from, made_by="cropi score", keep_parts=True, shared=True
    )
    say(f"scores of stage {stage}: {counts_text(manifest.counts)}")
    text = drift_warning(manifest.details["drift"], stage)
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


@dataclass(frozen=True)
class ScoredPool:
    """The trajectories that a stage is scored by, and facts of the prompts."""

    tables: Mapping[str, pa.Table]  # "train" and "validation/NAME" -> trajectories
    sources: Mapping[str, str]  # prompt id -> source, of all training prompts
    stage: int = 0


def score_pool(
    config: Config,
    settings: SurrogateSettings,
    model: nn.Module,
    pool: ScoredPool,
    folder: Path,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write `scores.parquet` to `folder`: one row per training prompt, those without signal included (influence 0).

    For a strategy that aims at candidates, halves of a sample of the pool replace the validation sets, with normalised
    means and `dot`. The ranks divide the prompts, or Ray workers score them. An interrupted scoring in `folder` is
    continued.

    Returns (rows by status, details) in the first process. Raises SignalError if a validation set has no mixed group or
    no score is finite.
    """
    strategy = config.select.strategy
    validation = _aims(config, pool.tables)
    names = list(validation)
    standard_errors = config.score.standard_errors and not strategy.reads_lengths  # of no use to lengths
    rows = _blank_rows(pool.sources, names)
    mixed = sorted(_note_facts(pool.tables["train"], rows))
    scorer = make_scorer(config, model, settings, strategy)
    shards, score_block = ScoreShards(folder, names, mixed), BlockScorer(scorer, names, standard_errors)
    found = _scored(scorer, score_block, shards, config, pool.tables["train"], validation)
    if not strategy.candidates_aimed_at:
        warn_of_noise(scorer.direction_reliability)
    if not process_group().is_main:
        return {}, {}
    tokens = _note_all(rows, found, validation)
    counts = count_status(row["status"] for row in rows.values())
    _check_finite(counts)
    reliability = add_reliability(config, rows, names, pool.stage) if standard_errors else None
    write_table(folder / "scores.parquet", list(rows.values()), scores_schema(names))
    shards.remove()
    details = {"reliability": reliability, "drift": policy_drift(rows.values())}
    return counts, tokens | details | _of_scorer(scorer) | _of_aims(validation)


def _note_all(
    rows: Mapping[str, dict[str, Any]],
    shards: Iterable[list[Row]],
    validation: Mapping[str, Sequence[Group]],
) -> dict[str, int]:
    """Enter the scores of all shards; return the tokens scored and computed, validation sets included."""
    validated = sum(group.completion_tokens for groups in validation.values() for group in groups)
    tokens = {"tokens": validated, "tokens_computed": 0}
    for shard in shards:
        tokens["tokens_computed"] += shard[0]["shard_tokens"] if shard else 0
        for row in shard:
            tokens["tokens"] += row["tokens"]
            entered = rows[row["prompt_id"]]
            entered["status"] = row["status"]
            if row["status"] == OK:
                entered |= {name: value for name, value in row.items() if name not in {"tokens", "shard_tokens"}}
    return tokens


def _aims(config: Config, trajectories: Mapping[str, pa.Table]) -> dict[str, list[Group]]:
    """Return the groups whose mean gradients are the directions."""
    aimed_at = config.select.strategy.candidates_aimed_at
    if aimed_at:
        return candidate_groups(trajectories["train"], aimed_at, config.seed)
    return validation_groups(trajectories)


def _of_scorer(scorer: Scorer) -> dict[str, Any]:
    return {
        "estimator": scorer.estimator,
        "projection": scorer.projection.identity if scorer.estimator == "sketch" else None,
        "score": scorer.score,
        "normalizer": scorer.settings.normalizer,
        "direction_reliability": {name: finite_or_none(value) for name, value in scorer.direction_reliability.items()},
    }


def _of_aims(validation: Mapping[str, Sequence[Group]]) -> dict[str, Any]:
    tokens = sum(len(group.prompt_ids) + group.completion_tokens for groups in validation.values() for group in groups)
    return {
        "validation_groups": {name: len(groups) for name, groups in validation.items()},
        "validation_tokens": tokens,
    }


def _blank_rows(sources: Mapping[str, str], names: list[str]) -> dict[str, dict[str, Any]]:
    """Rows of prompts without trajectories, by prompt id."""
    none: dict[str, Any] = {f"influence/{name}": 0.0 for name in names} | {"completion_tokens": 0, "feature_norm": 0.0}
    none |= {"pass_rate": None, "reward_variance": None, **dict.fromkeys(RATIO_COLUMNS)}
    none |= {"status": PROMPT_TOO_LONG}
    return {i: {**none, "prompt_id": i, "source": source} for i, source in sources.items()}


def _scored(
    scorer: Scorer,
    score: BlockScorer,
    shards: ScoreShards,
    config: Config,
    table: pa.Table,
    validation: Mapping[str, Sequence[Group]],
) -> Iterable[list[Row]]:
    """Score the missing shards, each by one rank or Ray worker; return the rows of all."""
    ranks, policy = process_group(), weights_identity(scorer.model)
    ranks.from_main(lambda: shards.begin(policy))
    missing = ranks.from_main(shards.missing)
    aimed_at = sum(len(piece) for groups in validation.values() for _, piece in ranks.share(pieces(groups)))
    own = sum(len(shards.ids(index)) for index in ranks.share(missing))
    with progress(ranks.titled("score"), aimed_at + own, "prompts") as bar:
        scorer.aim(validation, bar.advance)
        pool = ray_pool()
        if pool is not None:
            score_shards_by_ray(pool, config, config.select.strategy, score, shards, table, missing, bar.advance)
        else:
            score_missing_shards(shards, table, partial(score, advance=bar.advance), missing, scorer.lockstep())
    return shards.rows()


def _note_facts(table: pa.Table, rows: Mapping[str, dict[str, Any]]) -> list[str]:
    """Enter status, pass rate and length of each prompt; return the prompts with a gradient."""
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


# -- reliability ------------------------------------------------------------------------------------------------------

# Beyond any of these, a stage's scores depend more on old trajectories than on the policy.
LOW_ESS = 0.5  # half of the sample lost: where sequential Monte Carlo resamples (Liu & Chen 1995)
HIGH_CLIP_SHARE = 0.3  # PPO would take no step on so many tokens; training runs stay near 0.1 to 0.2
HIGH_KL = 0.1  # nats a token: 10 nats over a hundred tokens, completions that the policy would hardly write


def add_reliability(
    config: Config, rows: Mapping[str, dict[str, Any]], names: list[str], stage: int
) -> dict[str, Any] | None:
    """Enter every prompt's probability of being among the best, and summarise how reliable the ranking is.

    Per validation set: `reliability` of the influence. Over all sets: `expected_overlap`, the share of the top-ranked
    prompts that is expected to belong there, and the share that `chance` would give.
    """
    ok = [row for row in rows.values() if row["status"] == OK]
    if not ok:
        return None
    settings, size = config.select, selection_size(config.select.fraction, len(rows))
    estimates = {name: np.array([row[f"influence/{name}"] for row in ok]) for name in names}
    errors = {name: np.array([row[f"standard_error/{name}"] for row in ok], dtype=np.float64) for name in names}
    # A single error has one degree of freedom, so all prompts share the mean square.
    shared = {name: np.full(len(ok), np.sqrt(np.mean(errors[name] ** 2))) for name in names}
    depth = size if settings.fusion.truncate else None
    chances_N = top_probabilities(
        [shrunk(estimates[name], shared[name]) for name in names],
        size,
        kappa=settings.fusion.kappa,
        depth=depth,
        seed=derived_seed(config.seed, "reliability", stage),
    )
    for row in rows.values():
        row["top_probability"] = 0.0
    for row, chance in zip(ok, chances_N.tolist(), strict=True):
        row["top_probability"] = chance
    ranks_NV = np.stack([ranks(estimates[name], [row["prompt_id"] for row in ok]) for name in names], axis=1)
    best = np.argsort(-reciprocal_rank_fusion(ranks_NV, kappa=settings.fusion.kappa, depth=depth), kind="stable")[:size]
    return {
        "reliability": {name: reliability(estimates[name], errors[name]) for name in names},
        "expected_overlap": float(chances_N[best].mean()),
        "chance": min(1.0, size / len(ok)),
    }


def policy_drift(rows: Iterable[Mapping[str, Any]]) -> dict[str, float] | None:
    """Summarise how far the policy is from the one that sampled; None if no prompt has ratio statistics.

    The median over prompts with signal of the effective sample share, and the means of the clip share and of the
    divergence per token.
    """
    known = [row for row in rows if None not in (row["ratio_ess"], row["clip_share"], row["kl"])]
    if not known:
        return None
    return {
        "ratio_ess": float(np.median([row["ratio_ess"] for row in known])),
        "clip_share": float(np.mean([row["clip_share"] for row in known])),
        "kl": float(np.mean([row["kl"] for row in known])),
    }


def drift_warning(drift: Mapping[str, float] | None, stage: int) -> str | None:
    """Return a warning if the stored trajectories are too old for a stage, else None. `drift`: see `policy_drift`."""
    if drift is None:
        return None
    found = []
    if drift["ratio_ess"] < LOW_ESS:
        found.append(f"the median prompt keeps {drift['ratio_ess']:.0%} of its effective sample size (ratio_ess)")
    if drift["clip_share"] > HIGH_CLIP_SHARE:
        found.append(f"{drift['clip_share']:.0%} of the importance ratios are outside the clip range")
    if drift["kl"] > HIGH_KL:
        found.append(f"the divergence is {drift['kl']:.2f} nats a token")
    if not found:
        return None
    return (
        f"stage {stage}: the policy has moved far from the one that sampled the trajectories, so influence is noisy or "
        f"biased: {'; '.join(found)}. Train fewer steps, or begin anew from the present policy."
    )
