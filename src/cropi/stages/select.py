"""`select`: from a strategy's ranking to the prompts of a stage, with a reason for every prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
from cropi.curriculum.choose import choose, selection_batches
from cropi.curriculum.strategy import Candidates
from cropi.functional.ranking import selection_size
from cropi.prompt_text import prompt_text
from cropi.reward_statistics import GroupFacts
from cropi.stages.run import Run
from cropi.stages.score import read_scores
from cropi.stages.trajectories import require_signal
from cropi.training.reward_log import never_judged, newest_variances, training_history

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
    config: Config,
    candidates: Candidates,
    prompts: Mapping[str, Mapping[str, Any]],
    folder: Path,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write `selection.parquet` (every prompt) and `selected.jsonl` (the chosen ones, with prompt and answer)."""
    strategy = config.select.strategy
    if strategy.collects:
        require_signal(candidates.statuses)
    size = len(candidates) if strategy.takes_all else selection_size(config.select.fraction, len(candidates))
    ranking = strategy.rank(candidates, size, config.select.fusion)
    choice = choose(candidates, ranking, size)
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
    return counts, {"asked_for": size, "strategy": strategy.type, "stage": candidates.stage}


def _export_row(row: Mapping[str, Any], prompt: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: row[key] for key in ("prompt_id", "source", "rank", "score", "pass_rate", "reason")}
    return (
        {"prompt": json.loads(prompt["messages"]), "answer": prompt["answer"]} | kept | {"scores": dict(row["scores"])}
    )


def gather_candidates(run: Run, stage: int) -> Candidates:
    """The training pool at the start of a stage, with all that the run's strategy reads."""
    prompts, strategy = run.folder.train_prompts, run.config.select.strategy
    groups, before = run.trajectories.groups, stage * run.config.train.steps_per_stage
    history, unreadable = training_history(run.paths.rewards, before), never_judged(run.paths.rewards, before)
    sizes = _group_sizes(run.trajectories.tables["train"])
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
            GOLD_UNPARSEABLE if status == NOT_SAMPLED and i in unreadable else status
            for i, status in zip(prompts, run.trajectories.statuses, strict=True)
        ],
        pass_rates_N=np.array([groups.get(i, NOTHING).pass_rate for i in prompts]),
        variances_N=np.array([groups.get(i, NOTHING).variance for i in prompts]),
        training_variances=newest_variances(history),
        influence=influence,
        stage=stage,
        seed=run.config.seed,
        stages=run.config.train.stages,
        group_sizes_N=np.array([sizes.get(i, 0) for i in prompts]),
        lengths_N=lengths_N,
        texts=list(map(prompt_text, prompts.column("messages"))) if strategy.reads_texts else (),
        validation_texts=_validation_texts(run),
    )


def _validation_texts(run: Run) -> dict[str, list[str]]:
    """The texts of every validation set's prompts."""
    rows = run.folder.held_out("validation")
    names = sorted(run.config.prompts.validation)
    return {n: [prompt_text(row["messages"]) for row in rows if row["set"] == f"validation/{n}"] for n in names}


def _group_sizes(table: pa.Table) -> dict[str, int]:
    """Trajectories of every prompt of a table."""
    return {row["values"]: row["counts"] for row in pc.value_counts(table.column("prompt_id")).to_pylist()}
