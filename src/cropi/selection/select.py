"""`select`: from a strategy's ranking to the prompts of a stage, with a reason for every prompt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from math import floor, isnan
from pathlib import Path
from typing import Any

from cropi.artifacts import OK, SELECTION, count_status, write_table, write_text
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
from cropi.errors import SignalError
from cropi.functional.fusion import ranks
from cropi.functional.sampling import places
from cropi.seeds import unit_interval
from cropi.selection.candidates import Candidates, Ranking
from cropi.selection.dots import dots
from cropi.selection.full import full
from cropi.selection.gaussian import gaussian
from cropi.selection.gradient_norm import gradient_norm
from cropi.selection.greso import greso
from cropi.selection.influence import influence
from cropi.selection.learnability import learnability
from cropi.selection.learnalign import learnalign
from cropi.selection.mid import mid
from cropi.selection.mopps import mopps
from cropi.selection.pass_rate import pass_rate
from cropi.selection.pooled import pooled
from cropi.selection.random import random
from cropi.selection.similarity import similarity
from cropi.selection.vcrl import vcrl

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


def rank(candidates: Candidates, strategy: Strategy, config: SelectConfig) -> Ranking:
    """A strategy's scores for all candidates."""
    return RANKINGS[type(strategy)](candidates, strategy, config)


def choose(candidates: Candidates, ranking: Ranking, config: SelectConfig, size: int) -> list[dict[str, Any]]:
    """Rows of the selection table, best first: the top `size` under quotas and the exploration share.

    Ties break by prompt id. ceil(exploration x size) places go to prompts drawn at random among those that the strategy
    did not choose, those without signal included, so that nothing is excluded for ever. A quota caps a source's places
    at floor(quota x size), and at no less than one.
    """
    ids = candidates.prompt_ids
    eligible_ids = [i for i, fine in zip(ids, ranking.eligible_N, strict=True) if fine]
    order_of = dict(zip(eligible_ids, ranks(ranking.scores_N[ranking.eligible_N], eligible_ids).tolist(), strict=True))
    row_of = {prompt_id: row for row, prompt_id in enumerate(ids)}
    room = Counter({source: max(1, floor(Decimal(repr(share)) * size)) for source, share in config.quotas.items()})
    explored = places(config.exploration, size)
    best_first = sorted(order_of, key=order_of.__getitem__)
    chosen = _take(best_first, size - explored, candidates, row_of, config.quotas, room)
    rest = [i for i, usable in zip(ids, candidates.usable_N, strict=True) if usable and i not in chosen]
    rest.sort(key=lambda i: (unit_interval(candidates.seed, "explore", candidates.stage, i), i))
    extra = _take(rest, explored, candidates, row_of, config.quotas, room)
    if not chosen and not extra:
        raise SignalError(
            f"the selection of stage {candidates.stage} is empty: none of the {len(candidates)} prompts qualifies",
            where="select.strategy",
            fix="widen the strategy's band, raise collect.num_generations, or set select.exploration above 0.",
        )
    reasons = {i: _reason(ranking, row_of[i], order_of[i]) for i in chosen} | dict.fromkeys(extra, "exploration")
    best = [*best_first, *sorted(set(ids) - set(best_first))]
    return [_selection_row(candidates, ranking, row_of[i], order_of.get(i), reasons.get(i)) for i in best]


def _take(
    queue: list[str],
    count: int,
    candidates: Candidates,
    row_of: Mapping[str, int],
    quotas: Mapping[str, float],
    room: Counter[str],
) -> dict[str, None]:
    """The first `count` prompts of a queue whose source has room left, as an ordered set."""
    taken: dict[str, None] = {}
    for prompt_id in queue:
        if len(taken) >= count:
            break
        source = candidates.sources[row_of[prompt_id]]
        if source in quotas:
            if room[source] == 0:
                continue
            room[source] -= 1
        taken[prompt_id] = None
    return taken


def _reason(ranking: Ranking, row: int, order: int) -> str:
    by_set = ", ".join(f"{name} #{ranks_N[row]}" for name, ranks_N in sorted(ranking.set_ranks.items()))
    return f"{ranking.reason}: #{order}" + (f" ({by_set})" if by_set else "")


def _selection_row(
    candidates: Candidates, ranking: Ranking, row: int, order: int | None, reason: str | None
) -> dict[str, Any]:
    p = float(candidates.pass_rates_N[row])
    return {
        "prompt_id": candidates.prompt_ids[row],
        "source": candidates.sources[row],
        "selected": reason is not None,
        "rank": order,
        "score": float(ranking.scores_N[row]),
        "scores": [(name, float(values_N[row])) for name, values_N in sorted(candidates.influence.items())],
        "pass_rate": None if isnan(p) else p,
        "status": candidates.statuses[row],
        "reason": reason,
    }


def select(
    config: Config,
    strategy: Strategy,
    candidates: Candidates,
    prompts: Mapping[str, Mapping[str, Any]],
    folder: Path,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write `selection.parquet` (every prompt) and `selected.jsonl` (the chosen ones, with prompt and answer)."""
    require_signal(candidates.statuses)
    settings, size = config.select, places(config.select.fraction, len(candidates))
    if strategy.takes_all:
        settings, size = settings.model_copy(update={"quotas": {}, "exploration": 0.0}), len(candidates)
    ranking = rank(candidates, strategy, settings)
    rows = choose(candidates, ranking, settings, size)
    write_table(folder / "selection.parquet", rows, SELECTION)
    selected = [row for row in rows if row["selected"]]
    if len(selected) < size and not strategy.takes_all:
        warn(f"stage {candidates.stage}: {size} prompts were asked for, {len(selected)} qualify")
    lines = [json.dumps(_export_row(row, prompts[row["prompt_id"]]), ensure_ascii=False) for row in selected]
    write_text(folder / "selected.jsonl", "".join(line + "\n" for line in lines))
    counts = {"selected": len(selected), "left_out": len(rows) - len(selected)}
    return counts, {"asked_for": size, "strategy": strategy.type, "stage": candidates.stage, **ranking.facts}


def require_signal(statuses: Sequence[str]) -> int:
    """How many groups are mixed; SignalError where none is, for then there is nothing to learn from."""
    mixed = sum(status == OK for status in statuses)
    if not mixed:
        raise SignalError(
            f"none of the {len(statuses)} training prompts has both right and wrong completions "
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
