"""`select`: from a strategy's ranking to the prompts of a stage, with a reason for every prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from cropi.artifacts import OK, SELECTION, atomic_file, count_status, write_batches
from cropi.config import (
    Config,
    DotsStrategy,
    FullStrategy,
    GaussianStrategy,
    GradientNormStrategy,
    GresoStrategy,
    InfluenceStrategy,
    LearnabilityStrategy,
    LearnAlignStrategy,
    MidStrategy,
    MoppsStrategy,
    PassRateStrategy,
    PooledStrategy,
    RandomStrategy,
    SelectConfig,
    SimilarityStrategy,
    Strategy,
    StrategyTable,
    VcrlStrategy,
)
from cropi.console import counts_text, warn
from cropi.curriculum.candidates import Candidates, Ranking
from cropi.curriculum.choose import choose, selection_batches
from cropi.curriculum.strategies.dots import dots
from cropi.curriculum.strategies.full import full
from cropi.curriculum.strategies.gaussian import gaussian
from cropi.curriculum.strategies.gradient_norm import gradient_norm
from cropi.curriculum.strategies.greso import greso
from cropi.curriculum.strategies.influence import influence
from cropi.curriculum.strategies.learnability import learnability
from cropi.curriculum.strategies.learnalign import learnalign
from cropi.curriculum.strategies.mid import mid
from cropi.curriculum.strategies.mopps import mopps
from cropi.curriculum.strategies.pass_rate import pass_rate
from cropi.curriculum.strategies.pooled import pooled
from cropi.curriculum.strategies.random import random
from cropi.curriculum.strategies.similarity import similarity
from cropi.curriculum.strategies.vcrl import vcrl
from cropi.errors import SignalError
from cropi.functional.ranking import selection_size

RANKINGS: dict[type[StrategyTable], Callable[[Candidates, Any, SelectConfig], Ranking]] = {
    FullStrategy: full,
    RandomStrategy: random,
    PassRateStrategy: pass_rate,
    MidStrategy: mid,
    LearnabilityStrategy: learnability,
    VcrlStrategy: vcrl,
    GaussianStrategy: gaussian,
    DotsStrategy: dots,
    MoppsStrategy: mopps,
    GresoStrategy: greso,
    GradientNormStrategy: gradient_norm,
    LearnAlignStrategy: learnalign,
    InfluenceStrategy: influence,
    PooledStrategy: pooled,
    SimilarityStrategy: similarity,
}

LINES = 1 << 10  # rows of the export that are Python's objects at once: with many, its collector often walks the pool


def rank(candidates: Candidates, strategy: Strategy, config: SelectConfig) -> Ranking:
    """A strategy's scores for all candidates."""
    return RANKINGS[type(strategy)](candidates, strategy, config)


def select(
    config: Config,
    strategy: Strategy,
    candidates: Candidates,
    prompts: Mapping[str, Mapping[str, Any]],
    folder: Path,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write `selection.parquet` (every prompt) and `selected.jsonl` (the chosen ones, with prompt and answer)."""
    require_signal(candidates.statuses)
    settings, size = config.select, selection_size(config.select.fraction, len(candidates))
    if strategy.takes_all:
        settings, size = settings.model_copy(update={"quotas": {}, "exploration": 0.0}), len(candidates)
    ranking = rank(candidates, strategy, settings)
    choice = choose(candidates, ranking, settings, size)
    count = len(choice.reasons)
    if count < size and not strategy.takes_all:
        warn(f"stage {candidates.stage}: {size} prompts were asked for, {count} qualify")
    with atomic_file(folder / "selected.jsonl") as path, path.open("w", encoding="utf-8") as chosen:

        def exported(batch: pa.RecordBatch) -> pa.RecordBatch:
            """The batch, once its chosen prompts are written."""
            rows = batch.filter(batch.column("selected"))
            for start in range(0, len(rows), LINES):
                for row in rows.slice(start, LINES).to_pylist():
                    chosen.write(json.dumps(_export_row(row, prompts[row["prompt_id"]]), ensure_ascii=False) + "\n")
            return batch

        write_batches(
            folder / "selection.parquet", map(exported, selection_batches(candidates, ranking, choice)), SELECTION
        )
    counts = {"selected": count, "left_out": len(choice) - count}
    return counts, {"asked_for": size, "strategy": strategy.type, "stage": candidates.stage, **ranking.facts}


def require_signal(statuses: Sequence[str]) -> int:
    """How many groups are mixed; SignalError where none is, for then there is nothing to learn from."""
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


def _export_row(row: Mapping[str, Any], prompt: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: row[key] for key in ("prompt_id", "source", "rank", "score", "pass_rate", "reason")}
    return (
        {"prompt": json.loads(prompt["messages"]), "answer": prompt["answer"]} | kept | {"scores": dict(row["scores"])}
    )
