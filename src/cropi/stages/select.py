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
    TRAJECTORIES,
    atomic_file,
    build,
    is_finished,
    open_artifact,
    read_table,
    write_batches,
)
from cropi.config import Config
from cropi.console import say, warn
from cropi.curriculum.choose import choose, selection_batches
from cropi.curriculum.pooling_data import PoolingData, read_pooling_data
from cropi.curriculum.strategy import Candidates
from cropi.functional.ranking import selection_size
from cropi.prompt_text import prompt_text
from cropi.reward_statistics import GroupFacts, Visit, visit
from cropi.rollouts.representations import KIND as REPRESENTED
from cropi.rollouts.representations import read_representations
from cropi.rollouts.shards import read_trajectories
from cropi.run_tables import validation_scores_schema
from cropi.stages.run import Run
from cropi.stages.score import read_scores
from cropi.stages.trajectories import FRESH, Overlay, require_signal
from cropi.training.reward_log import never_judged, newest_variances, training_history

LINES = 1 << 10  # rows of the export that are Python's objects at once: with many, its collector often walks the pool
NOTHING = GroupFacts("", float("nan"), float("nan"))  # of a prompt without trajectories


def select(run: Run, stage: int) -> list[str]:
    """Select the prompts of a stage, or read the selection back where it has been made. Returns prompt ids."""

    def make(folder: Path) -> tuple[Mapping[str, int], Mapping[str, Any]]:
        with run.ledger.charge("select", stage=stage):
            return choose_prompts(run.config, gather_candidates(run, stage), run.folder.train_prompts, folder)

    strategy, folder = run.config.select.strategy, run.paths.selection(stage)
    inputs: dict[str, Any] = {**run.trajectories.inputs(stage), "settings": run.folder.settings()}
    if strategy.reads_scores:
        scores = run.paths.scores(strategy.scored_stage(stage))
        inputs["scores"] = open_artifact(scores, "scores", made_by="cropi score").identity
    if run.is_finished(run.paths.screened(stage)):
        inputs["screened"] = open_artifact(run.paths.screened(stage), FRESH, made_by="cropi score").identity
    new = not run.is_finished(folder)
    manifest = build(folder, "selection", make, inputs=inputs, made_by="cropi select")
    if new:
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
    choice = choose(candidates, ranking, size, 0.0 if strategy.takes_all else config.select.exploration)
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


def _export_row(row: Mapping[str, Any], prompt: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: row[key] for key in ("prompt_id", "source", "rank", "score", "pass_rate", "reason")}
    return (
        {"prompt": json.loads(prompt["messages"]), "answer": prompt["answer"]} | kept | {"scores": dict(row["scores"])}
    )


def gather_candidates(run: Run, stage: int) -> Candidates:
    """The training pool at the start of a stage, with all that the run's strategy reads."""
    prompts, strategy = run.folder.train_prompts, run.config.select.strategy
    overlay, steps = run.trajectories.overlay(stage), run.config.train.steps_per_stage
    groups = run.trajectories.groups(overlay)
    history, pooling = training_history(run.paths.rewards, stage * steps), None
    screened, unreadable = _screened(run, stage)
    unreadable |= never_judged(run.paths.rewards, stage * steps)
    sizes = _group_sizes(run.trajectories.base["train"]) | _group_sizes(overlay.table)
    sizes_N = np.array([sizes.get(i, 0) for i in prompts])
    influence, lengths_N = dict[str, np.ndarray](), None
    if strategy.reads_scores:
        table = read_scores(run, strategy.scored_stage(stage))
        names = strategy.directions(run.config.prompts.validation)
        influence = {name: table.column(f"influence/{name}").to_numpy() for name in names}
        lengths_N = table.column("feature_norm").to_numpy()
        pooling = _pooling_data(run, stage, table, sizes_N, overlay) if strategy.pools else None
    return Candidates(
        prompt_ids=list(prompts),
        sources=prompts.column("source"),
        statuses=[
            GOLD_UNPARSEABLE if status == NOT_SAMPLED and i in unreadable else status
            for i, status in zip(prompts, run.trajectories.statuses(groups), strict=True)
        ],
        pass_rates_N=np.array([groups.get(i, NOTHING).pass_rate for i in prompts]),
        variances_N=np.array([groups.get(i, NOTHING).variance for i in prompts]),
        training_variances=newest_variances(history, overlay.drawn_at(steps)),
        influence=influence,
        stage=stage,
        seed=run.config.seed,
        stages=run.config.train.stages,
        steps_per_stage=steps,
        group_sizes_N=sizes_N,
        lengths_N=lengths_N,
        visits=[*history, *screened],
        texts=list(map(prompt_text, prompts.column("messages"))) if strategy.reads_texts else (),
        validation_texts=_validation_texts(run),
        pooling=pooling,
    )


def _screened(run: Run, stage: int) -> tuple[list[Visit], set[str]]:
    """Read the rewards of prompts screened up to a stage, and the prompts whose answers cannot be read."""
    seen: list[Visit] = []
    unreadable: set[str] = set()
    for number in range(stage + 1):
        folder = run.paths.screened(number)
        if is_finished(folder):
            open_artifact(folder, FRESH, made_by="cropi score")  # checks the files
            table = read_trajectories(folder).get("train", TRAJECTORIES.empty_table())
            known = pc.is_valid(table.column("reward"))
            unreadable |= set(table.filter(pc.invert(known)).column("prompt_id").to_pylist())
            judged = table.filter(known)
            groups = judged.group_by("prompt_id").aggregate([("reward", "list")]).to_pylist()
            step = number * run.config.train.steps_per_stage
            seen += [visit(step, row["prompt_id"], row["reward_list"]) for row in groups]
    return seen, unreadable


def _pooling_data(run: Run, stage: int, scores: pa.Table, sizes_N: np.ndarray, overlay: Overlay) -> PoolingData:
    """Inputs of a strategy that pools, from the newest scores."""
    open_artifact(run.folder.representations, REPRESENTED, made_by="cropi score")
    names = sorted(run.config.prompts.validation)
    scored, steps = run.config.select.strategy.scored_stage(stage), run.config.train.steps_per_stage
    validation = read_table(run.paths.scores(scored) / "validation.parquet", validation_scores_schema(names))
    ids, drawn_at = list(run.folder.train_prompts), overlay.drawn_at(steps)
    trained = {prompt_id for prompt_id, layer in overlay.layer_of.items() if layer.trained}
    return read_pooling_data(
        names,
        scores,
        validation,
        read_representations(run.folder.representations),
        sizes_N,
        np.array([0.0 if i in trained else float(n) for i, n in zip(ids, sizes_N, strict=True)]),
        np.array([drawn_at.get(i, 0.0) for i in ids], dtype=np.float64),
        scored * steps if run.config.refresh.validation else 0.0,
    )


def _validation_texts(run: Run) -> dict[str, list[str]]:
    """The texts of every validation set's prompts."""
    rows = run.folder.held_out("validation")
    names = sorted(run.config.prompts.validation)
    return {n: [prompt_text(row["messages"]) for row in rows if row["set"] == f"validation/{n}"] for n in names}


def _group_sizes(table: pa.Table) -> dict[str, int]:
    """Trajectories of every prompt of a table."""
    return {row["values"]: row["counts"] for row in pc.value_counts(table.column("prompt_id")).to_pylist()}
