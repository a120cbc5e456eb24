"""`select`: from a strategy's ranking to the prompts of a stage, with a reason for every prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from cropi.artifacts import (
    GOLD_UNPARSEABLE,
    NOT_SAMPLED,
    SELECTION,
    atomic_file,
    build,
    open_artifact,
    read_table,
    write_batches,
)
from cropi.config import Config
from cropi.console import say, warn
from cropi.curriculum.strategy import Candidates, Ranking
from cropi.errors import SignalError
from cropi.functional.influence_formulas import reward_variance
from cropi.functional.ranking import ranks, selection_size
from cropi.gradients.groups import GroupFacts
from cropi.prompt_text import prompt_text
from cropi.stages.run import Run, require_signal
from cropi.stages.score import read_scores
from cropi.training.reward_log import newest_rewards

BLOCK = 1 << 18  # rows of the table that are built at a time
LINES = 1 << 10  # rows of the export that are Python's objects at once: with many, its collector often walks the pool
NOTHING = GroupFacts("", float("nan"), float("nan"))  # of a prompt without trajectories


def select(run: Run, stage: int) -> list[str]:
    """Select the prompts of a stage, or read the selection back where it has been made. Returns prompt ids."""

    def make(folder: Path) -> tuple[Mapping[str, int], Mapping[str, Any]]:
        with run.ledger.charge("select", stage=stage):
            return choose_prompts(run.config, gather_candidates(run, stage), run.folder.train_prompts, folder)

    strategy, folder = run.config.select.strategy, run.paths.selection(stage)
    inputs: dict[str, Any] = {**run.trajectories.inputs, "settings": run.folder.settings()}
    if strategy.reads_scores:
        scores = run.paths.scores(strategy.scored_stage(stage))
        inputs["scores"] = open_artifact(scores, "scores", made_by="cropi score").identity
    new = not run.is_finished(folder)
    manifest = build(folder, "selection", make, inputs=inputs, made_by="cropi select")
    if new and not strategy.chooses_online:
        chosen, pool = manifest.counts["selected"], len(run.folder.train_prompts)
        say(f"selection of {run.config.select.label}, stage {stage}: {chosen} of {pool} prompts")
    rows = read_table(folder / "selection.parquet", SELECTION).to_pylist()
    return [row["prompt_id"] for row in rows if row["selected"]]


def choose_prompts(
    config: Config, candidates: Candidates, prompts: Mapping[str, Mapping[str, Any]], folder: Path
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write `selection.parquet` (every prompt) and `selected.jsonl` (the chosen ones, with prompt and answer)."""
    strategy = config.select.strategy
    if strategy.collects:
        require_signal(candidates.statuses)
    size = len(candidates) if strategy.takes_all else selection_size(config.select.fraction, len(candidates))
    ranking = strategy.rank(candidates, size, config.select.fusion)
    selected = choose(candidates, ranking, size)
    count = len(selected.reasons)
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
            folder / "selection.parquet", map(exported, selection_batches(candidates, ranking, selected)), SELECTION
        )
    counts = {"selected": count, "left_out": len(selected) - count}
    return counts, {"asked_for": size, "strategy": strategy.type, "stage": candidates.stage}


def _export_row(row: Mapping[str, Any], prompt: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: row[key] for key in ("prompt_id", "source", "rank", "score", "pass_rate", "reason")}
    return (
        {"prompt": json.loads(prompt["messages"]), "answer": prompt["answer"]} | kept | {"scores": dict(row["scores"])}
    )


def gather_candidates(run: Run, stage: int) -> Candidates:
    """The training pool at the start of a stage, with all that the run's strategy reads."""
    prompts, strategy = run.folder.train_prompts, run.config.select.strategy
    groups, first_step = run.trajectories.groups, stage * run.config.train.steps_per_stage
    facts, trained = [groups.get(i, NOTHING) for i in prompts], newest_rewards(run.paths.rewards, first_step)
    influence, lengths_N = dict[str, np.ndarray](), None
    if strategy.reads_scores:
        table = read_scores(run, strategy.scored_stage(stage))
        names = strategy.directions(run.config.prompts.validation)
        influence = {name: table.column(f"influence/{name}").to_numpy() for name in names}
        lengths_N = table.column("feature_norm").to_numpy()
    return Candidates(
        prompt_ids=list(prompts),
        sources=prompts.column("source"),
        statuses=[
            GOLD_UNPARSEABLE if status == NOT_SAMPLED and trained.get(i) == [] else status
            for i, status in zip(prompts, run.trajectories.statuses, strict=True)
        ],
        pass_rates_N=np.array([own.pass_rate for own in facts]),
        variances_N=np.array([own.variance for own in facts]),
        training_variances={i: float(reward_variance(np.array(own))) for i, own in trained.items() if own},
        influence=influence,
        stage=stage,
        seed=run.config.seed,
        stages=run.config.train.stages,
        group_sizes_N=np.array([own.size for own in facts]),
        lengths_N=lengths_N,
        texts=list(map(prompt_text, prompts.column("messages"))) if strategy.reads_texts else (),
        validation_texts={
            name: [prompt_text(row["messages"]) for row in rows] for name, rows in run.folder.validation_prompts.items()
        },
    )


# -- from a ranking to a selection -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selected:
    """All prompts, best first, and which of them are selected."""

    rows_N: Int[np.ndarray, " N"]  # of the candidates
    ranks_N: Int[np.ndarray, " N"]  # of the candidates, in their order; 0 for an ineligible one
    reasons: Mapping[int, str]  # by row of the candidates, for the chosen ones, best first

    def __len__(self) -> int:
        return len(self.rows_N)


def choose(candidates: Candidates, ranking: Ranking, size: int) -> Selected:
    """Choose the best `size` prompts. Ties break by prompt id."""
    eligible = np.flatnonzero(ranking.eligible_N)
    ranks_N = np.zeros(len(candidates), dtype=np.int64)
    ranks_N[eligible] = ranks(ranking.scores_N[eligible])
    best_first = np.empty_like(eligible)
    best_first[ranks_N[eligible] - 1] = eligible
    chosen = best_first[:size]
    if not len(chosen):
        raise SignalError(
            f"the selection of stage {candidates.stage} is empty: none of the {len(candidates)} prompts qualifies",
            where="select.strategy",
            fix="widen the strategy's band, or raise collect.num_generations.",
        )
    rest = np.flatnonzero(~ranking.eligible_N)
    return Selected(np.concatenate([best_first, rest]), ranks_N, _reasons(ranking, chosen, ranks_N))


def _reasons(ranking: Ranking, chosen: Int[np.ndarray, " T"], ranks_N: Int[np.ndarray, " N"]) -> dict[int, str]:
    """By row, in the order chosen: the strategy's reason, the rank, and the rank in every validation set."""
    texts = [f"{ranking.reason}: #{order}" for order in ranks_N[chosen].tolist()]
    if names := sorted(ranking.set_ranks):
        columns = [[f"{name} #{rank}" for rank in ranking.set_ranks[name][chosen].tolist()] for name in names]
        texts = [f"{text} ({', '.join(sets)})" for text, *sets in zip(texts, *columns, strict=True)]
    return dict(zip(chosen.tolist(), texts, strict=True))


def selection_batches(candidates: Candidates, ranking: Ranking, selected: Selected) -> Iterator[pa.RecordBatch]:
    """The selection table, best first, in blocks."""
    # Picking rows out of order is several times as fast from Arrow columns as from lists of strings.
    texts = [pa.array(each, pa.string()) for each in (candidates.prompt_ids, candidates.sources, candidates.statuses)]
    chosen_N = np.zeros(len(candidates), dtype=bool)
    chosen_N[np.fromiter(selected.reasons, dtype=np.int64, count=len(selected.reasons))] = True
    for start in range(0, len(selected), BLOCK):
        rows_B = selected.rows_N[start : start + BLOCK]
        picked = [text.take(pa.array(rows_B)) for text in texts]
        yield _block(candidates, ranking, selected, rows_B, chosen_N[rows_B], picked)


def _block(
    candidates: Candidates,
    ranking: Ranking,
    selected: Selected,
    rows_B: Int[np.ndarray, " B"],
    chosen_B: Bool[np.ndarray, " B"],
    texts: Sequence[pa.Array],
) -> pa.RecordBatch:
    prompt_ids, sources, statuses = texts
    ranks_B, rates_B = selected.ranks_N[rows_B], candidates.pass_rates_N[rows_B]
    flags = zip(rows_B.tolist(), chosen_B.tolist(), strict=True)
    reasons = [selected.reasons[row] if chosen else None for row, chosen in flags]
    names = sorted(candidates.influence)
    items_BV = np.stack([candidates.influence[name][rows_B] for name in names], axis=1) if names else np.empty((0, 0))
    offsets = pa.array(np.arange(len(rows_B) + 1, dtype=np.int32) * len(names))
    keys = pa.DictionaryArray.from_arrays(
        np.tile(np.arange(len(names), dtype=np.int32), len(rows_B)), pa.array(names, pa.string())
    ).dictionary_decode()
    columns = [
        prompt_ids,
        sources,
        pa.array(chosen_B),
        pa.array(ranks_B, pa.int32(), mask=ranks_B == 0),
        pa.array(ranking.scores_N[rows_B], pa.float64()),
        pa.MapArray.from_arrays(offsets, keys, pa.array(items_BV.ravel(), pa.float64())),
        pa.array(rates_B, pa.float64(), mask=np.isnan(rates_B)),
        statuses,
        pa.array(reasons, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SELECTION)
