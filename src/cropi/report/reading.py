"""Readers of a run's folder for reports. Everything may be missing: a run can be reported at any time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cropi.artifacts import (
    EVALUATION,
    OK,
    SELECTION,
    Manifest,
    is_finished,
    open_artifact,
    read_manifest,
    read_table,
)
from cropi.config import Config
from cropi.functional.ranking import selection_size
from cropi.prompt_text import turn_text
from cropi.run_folder import RunFolder, StagePaths
from cropi.run_tables import beliefs_schema, evaluation_files, scores_schema
from cropi.streams import read_jsonl

Results = Mapping[str, Mapping[str, float]]  # test set -> prompt id -> 1 right, 0 wrong, or a mean of samples


@dataclass(frozen=True)
class Reliability:
    """Reliability of a stage's ranking, from the errors of its influence."""

    by_set: Mapping[str, float]  # share of the influence's variance that is not noise, by validation set
    best: int  # how many of the best ranked a plain selection takes
    expected_overlap: float  # share of those that is expected to belong there
    chance: float  # share of as many drawn at random among the prompts with signal


@dataclass(frozen=True)
class Drift:
    """Distance of a stage's policy from the behaviour policy, over the prompts with signal."""

    ratio_ess: float  # median effective sample size of a prompt's token ratios, as a share of its tokens
    clip_share: float  # mean share of the token ratios outside 1 - clip to 1 + clip
    kl: float  # mean KL(policy || behaviour policy) per token, in nats


@dataclass(frozen=True)
class StageQuality:
    """Quality of a stage's scores. None: not measured."""

    stage: int
    direction_reliability: Mapping[str, float | None]  # by validation set: would other prompts give its direction again
    reliability: Reliability | None
    drift: Drift | None


@dataclass(frozen=True)
class Answers:
    """One evaluation: what was answered right. `sampled` holds the sets for which completions were sampled."""

    greedy: Results
    sampled: Results


@dataclass(frozen=True)
class Selection:
    """One stage's selection, in the order of the strategy's ranking."""

    prompt_ids: Sequence[str]
    sources: Sequence[str]
    selected: Sequence[bool]

    @property
    def chosen(self) -> frozenset[str]:
        """Ids of the selected prompts."""
        return frozenset(i for i, taken in zip(self.prompt_ids, self.selected, strict=True) if taken)


def read_answers(folder: Path) -> dict[int, Answers]:
    """Evaluations by optimiser step, in ascending order."""
    files = evaluation_files(folder, all_there=True)
    return {step: answers_of(read_table(path, EVALUATION)) for step, path in files.items()}


def answers_of(table: pa.Table) -> Answers:
    """The answers in the table of an evaluation."""
    columns = (table.column(name).to_pylist() for name in ("set", "prompt_id", "greedy", "sampled"))
    greedy: dict[str, dict[str, float]] = {}
    sampled: dict[str, dict[str, float]] = {}
    for name, prompt_id, right, mean in zip(*columns, strict=True):
        greedy.setdefault(name, {})[prompt_id] = right
        if mean is not None:
            sampled.setdefault(name, {})[prompt_id] = mean
    whole = {name: values for name, values in sampled.items() if len(values) == len(greedy[name])}
    return Answers(greedy, whole)


def selection_table(paths: StagePaths, stage: int) -> pa.Table | None:
    """A stage's selection with all columns; None where it has not been made."""
    folder = paths.selection(stage)
    if not is_finished(folder):
        return None
    open_artifact(folder, "selection", made_by="cropi select")
    return read_table(folder / "selection.parquet", SELECTION)


def read_selection(paths: StagePaths, stage: int) -> Selection | None:
    """A stage's selection; of a strategy that chooses batch by batch, the prompts of the stage's batches."""
    table = selection_table(paths, stage)
    if table is None:
        return None
    ids, sources, selected = (table.column(name).to_pylist() for name in ("prompt_id", "source", "selected"))
    if paths.choices.is_file():
        batches = [batch for batch in read_jsonl(paths.choices) if batch["stage"] == stage]
        chosen = {prompt_id for batch in batches for prompt_id in batch["prompt_ids"]}
        selected = [prompt_id in chosen for prompt_id in ids]
    return Selection(ids, sources, selected)


def read_selections(paths: StagePaths, stages: int) -> dict[int, Selection]:
    """Finished selections by stage."""
    found = {stage: read_selection(paths, stage) for stage in range(stages)}
    return {stage: selection for stage, selection in found.items() if selection is not None}


def directions(config: Config) -> list[str]:
    """Names of the directions that influence is measured along."""
    return config.select.strategy.directions(config.prompts.validation)


def read_scores(config: Config, paths: StagePaths) -> dict[int, pa.Table]:
    """Finished influence tables by stage."""
    return _finished(config, paths.scores, "scores", "cropi score", scores_schema(directions(config)))


def read_beliefs(config: Config, paths: StagePaths) -> dict[int, pa.Table]:
    """Beliefs about the pool at the end of each stage, where influence is read while training."""
    return _finished(config, paths.beliefs, "beliefs", "cropi train", beliefs_schema(config.prompts.validation))


def _finished(
    config: Config, folder_of: Callable[[int], Path], kind: str, made_by: str, schema: pa.Schema
) -> dict[int, pa.Table]:
    """The tables `KIND.parquet` of the stages that have one."""
    tables = {}
    for stage in range(config.train.stages):
        folder = folder_of(stage)
        if is_finished(folder):
            open_artifact(folder, kind, made_by=made_by)
            tables[stage] = read_table(folder / f"{kind}.parquet", schema)
    return tables


def way(why: str) -> str:
    """Why a prompt got its place, from a line of `choices.jsonl`: a way of choosing and a validation set."""
    chosen_by, _, name = why.partition(" ")
    words = {"mean": "largest expected gain", "draw": "drawn from the belief", "uniform": "random"}
    return words.get(chosen_by, chosen_by) + (f" on {name}" if name else "")


def read_quality(config: Config, paths: StagePaths) -> tuple[StageQuality, ...]:
    """Quality of the scores by stage, as `score` noted it; nothing for strategies without influence."""
    found = []
    for stage in range(config.train.stages):
        if not is_finished(paths.scores(stage)):
            continue
        made = open_artifact(paths.scores(stage), "scores", made_by="cropi score")
        noted, moved = made.details["reliability"], made.details["drift"]
        best = min(selection_size(config.select.fraction, sum(made.counts.values())), made.counts.get(OK, 0))
        reliability = noted and Reliability(noted["reliability"], best, noted["expected_overlap"], noted["chance"])
        found.append(StageQuality(stage, made.details["direction_reliability"], reliability, moved and Drift(**moved)))
    return tuple(found)


def rows_of(table: pa.Table, prompt_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Rows of a few prompts, by id."""
    ids = pa.array(list(prompt_ids), pa.string())
    return {row["prompt_id"]: row for row in table.filter(pc.is_in(table.column("prompt_id"), ids)).to_pylist()}


def prompt_text(messages: str) -> str:
    """The prompt of a row of the prompt table as a person reads it: chat turns each with its role."""
    turns = json.loads(messages)
    return turns if isinstance(turns, str) else "\n".join(f"[{turn['role']}] {turn_text(turn)}" for turn in turns)


def read_collected(run: RunFolder) -> Manifest | None:
    """The manifest of the stored trajectories, with `collect`'s counts; None where collection has not finished."""
    done = is_finished(run.trajectories)
    return read_manifest(run.trajectories, "trajectories", made_by="cropi collect") if done else None


def read_completions(run: RunFolder, prompt_ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Stored completions of a few training prompts, by prompt id and in the order they were sampled."""
    if not is_finished(run.trajectories):
        return {}
    open_artifact(run.trajectories, "trajectories", made_by="cropi collect")
    columns = ["set", "prompt_id", "sample", "completion", "verdict", "status"]
    wanted = [("prompt_id", "in", list(prompt_ids)), ("set", "=", "train")]
    parts = sorted(run.trajectories.glob("part-*.parquet"))
    rows = [row for path in parts for row in pq.read_table(path, columns=columns, filters=wanted).to_pylist()]
    rows.sort(key=lambda row: row["sample"])
    return {prompt_id: [row for row in rows if row["prompt_id"] == prompt_id] for prompt_id in prompt_ids}
