"""The report of a run: one self-contained HTML page, the same in Markdown, and the numbers in JSON."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from cropi.artifacts import CLIP_RANGE, PROMPT_TOO_LONG, count_status, is_finished, read_sealed, write_json
from cropi.config import Config
from cropi.functional.intervals import CONFIDENCE
from cropi.report import figures
from cropi.report.blocks import Block, Code, Numbers, Picture, Section, Table, Text
from cropi.report.choosing import choosing, jaccard, random_jaccard, selected_sources, share_table
from cropi.report.closeups import before_and_after, closeups
from cropi.report.reading import (
    Drift,
    Reliability,
    Selection,
    StageQuality,
    directions,
    read_collected,
    read_scores,
    read_selections,
)
from cropi.report.rendering import write_report
from cropi.report.summary import Summary, headline, large_numbers, summarise
from cropi.report.wording import (
    ABSENT,
    NOT_MEASURED,
    about,
    count,
    decimal,
    percent,
    share,
    significant,
    tenths,
    with_interval,
)
from cropi.run_folder import ENVIRONMENT, RunFolder

COST_NOTE = (
    "The total is collect + score + select + train. Collection before training counts only where the strategy reads "
    "the stored trajectories. Evaluation is not part of the total. Training seconds are those of the optimiser steps "
    "that led to the final weights, rollouts included. Work lost to an interruption counts, except that of training."
)


def make_report(run: RunFolder, *, live: bool = False) -> Summary:
    """Write `report.html`, `report.md` and `summary.json` to a run's folder, from what the folder holds.

    A run may be reported at any time: what is not there yet is left out and said to be. The same folder gives the same
    bytes. `live`: the run goes on, and the page reloads itself. Raises ArtifactError where a file is corrupt.
    """
    config, folder = run.config, run.folder
    summary = summarise(config, run)
    write_report(folder, "report", _title(config), sections(config, run, summary), live=live)
    write_json(folder / "summary.json", summary.as_json())
    return summary


def _title(config: Config) -> str:
    """The run's name; for the curriculum of a TRL script the folder that the script writes to."""
    parent = config.folder.absolute().parent
    place = parent.parent if parent.name.startswith("_") else parent
    return f"curriculum of {place.name}" if config.is_of_script else f"cropi run {config.name}"


def sections(config: Config, run: RunFolder, summary: Summary) -> list[Section]:
    """The report, in order; a section that has nothing to show is only named."""
    selections, scores = read_selections(run.stages, config.train.stages), read_scores(config, run.stages)
    choice = (
        Section("Belief, choice and their cost", choosing(config, run))
        if config.select.strategy.reads_influence
        else Section("What was selected", _selected(selections))
    )
    ranking = reliability(config, summary.stages) if scores else []
    prompts = closeups(config, run) if selections and is_finished(run.prompts) else []
    every = [
        Section("Result", _result(summary)),
        Section("Answers before and after", before_and_after(config, run)),
        choice,
        Section("Can the ranking be trusted?", ranking),
        Section("Training prompts, close up", prompts),
        Section("Cost", _cost(summary)),
        Section("What became of every prompt", funnel(run, selections, scores)),
        Section("Settings, and how to reproduce it", [*settings(config, run), *reproduction(config)]),
    ]
    empty = [section.title for section in every if not section.blocks]
    shown = [section for section in every if section.blocks]
    return [*shown, Section("Not there yet", [Text("; ".join(empty))])] if empty else shown


# -- result ------------------------------------------------------------------------------------------------------------


def _result(summary: Summary) -> list[Block]:
    """The numbers and the curve first, then prose and tables."""
    level = percent(CONFIDENCE)
    caption = f"Greedy accuracy, mean over test sets. Bands: {level} bootstrap intervals over questions, one seed."
    drawn = figures.learning_curves(summary, caption)
    if not summary.tested:
        drawn = figures.reward_curve(summary, "On the prompts that were chosen: no measure beside other strategies.")
    blocks: list[Block] = [Numbers(large_numbers(summary)), *([drawn] if drawn else [])]
    blocks.append(Text(headline(summary), lead=True))
    points = [[str(p.step), with_interval(p.targeted), with_interval(p.untargeted)] for p in summary.curve]
    if summary.last:
        header = ["step", "targeted", "untargeted"]
        blocks += [*_by_set(summary), Table("Accuracy by step.", header, points, left=0, collapsed=True)]
    if summary.rewards:
        rows = [[str(stage), decimal(reward)] for stage, reward in enumerate(summary.rewards)]
        caption = "Mean reward in training, on the prompts of each stage."
        blocks.append(Table(caption, ["stage", "mean reward"], rows, left=0, collapsed=True))
    return blocks


def _by_set(summary: Summary) -> list[Block]:
    """Accuracy by test set; no table where there is one set only."""
    columns = {"base policy": summary.base_by_set, summary.strategy: summary.final}
    rows = [
        [name, kind, *(with_interval(by_set.get(name, {}).get(kind)) for by_set in columns.values())]
        for name, kinds in summary.final.items()
        for kind in kinds
    ]
    return [Table("Accuracy by test set.", ["test set", "answers", *columns], rows, left=2)] if len(rows) > 1 else []


# -- selections --------------------------------------------------------------------------------------------------------


def _selected(selections: Mapping[int, Selection]) -> list[Block]:
    if not selections:
        return []
    rows = []
    for stage, overlap in jaccard(selections).items():
        before, now = selections[stage - 1].chosen, selections[stage].chosen
        numbers = (count(len(part)) for part in (before & now, now - before, before - now))
        expected = random_jaccard(len(now) / len(selections[stage].selected))
        rows.append([f"{stage - 1} → {stage}", *numbers, decimal(overlap), decimal(expected)])
    shares = share_table(selected_sources(selections), "Prompts selected, by source.")
    header = ["stages", "kept", "new", "dropped", "overlap", "of random draws"]
    return [shares, *([Table("Turnover. Overlap: kept ÷ (kept + new + dropped).", header, rows)] if rows else [])]


# -- statuses ----------------------------------------------------------------------------------------------------------

Rows = list[list[str]]


def funnel(run: RunFolder, selections: Mapping[int, Selection], scores: Mapping[int, pa.Table]) -> list[Block]:
    """Tables of statuses and verdicts, as far as the run has come."""
    rows, collected = _prompt_rows(run), read_collected(run)
    sets: Mapping[str, Any] = {} if collected is None else collected.details.get("sets", {})
    if collected is not None and sets and (skipped := collected.counts.get(PROMPT_TOO_LONG, 0)):
        rows.append(["prompts", "all sets but test", PROMPT_TOO_LONG, count(skipped), ""])
    for name, own in sets.items():
        rows += _count_rows("trajectories", name, own["status"])
    if "train" in sets:
        rows += _count_rows("training groups", "", sets["train"]["signal"])
    for stage, table in scores.items():
        rows += _count_rows("scores", f"influence, stage {stage}", count_status(table.column("status").to_pylist()))
    for stage, selection in selections.items():
        taken, pool = sum(selection.selected), len(selection.selected)
        rows.append(["selection", f"stage {stage}", "selected", count(taken), share(taken / max(pool, 1))])
    if not rows:
        return []
    caption = (
        "Rows by status. A group is mixed when its completions are rewarded unlike. A group without signal has a "
        "gradient of zero."
    )
    table = Table(caption, ["step", "of", "status", "rows", "share"], rows, left=3)
    rows = [row[1:] for name, own in sets.items() for row in _count_rows("", name, own["verdict"])]
    header = ["of", "verdict", "completions", "share"]
    return [table, *([Table("Verdicts on the stored trajectories.", header, rows, left=2)] if rows else [])]


def _prompt_rows(run: RunFolder) -> Rows:
    if not is_finished(run.prompts):
        return []
    by_set = Counter(row["set"] for row in run.prompt_rows)
    return [["prompts", name, "", count(number), ""] for name, number in by_set.items()]


def _count_rows(step: str, of: str, counts: Mapping[str, int]) -> Rows:
    total = sum(counts.values())
    return [[step, of, status, count(number), share(number / total)] for status, number in counts.items()]


# -- cost --------------------------------------------------------------------------------------------------------------


def _cost(summary: Summary) -> list[Block]:
    cost = summary.cost
    phases = (*figures.PHASES, "total", "evaluate")
    if all(getattr(cost, phase) is None for phase in phases):
        return []
    row = [
        *(tenths(getattr(cost, phase)) for phase in phases),
        share(cost.selection_share),
        count(cost.collect_tokens),
        count(cost.train_tokens),
    ]
    header = [*phases, "(score + select) ÷ train", "tokens collected", "tokens in training"]
    table = Table("Seconds by phase, and generated tokens.", header, [row], left=0)
    if cost.total is None:
        return [table, Text(COST_NOTE)]
    spent = {phase: getattr(cost, phase) or 0.0 for phase in figures.PHASES}
    drawn = figures.cost_split({"seconds": {summary.strategy: spent}}, "cost")
    return [*([Picture(drawn, "Time by phase, evaluation left out.")] if drawn else []), table, Text(COST_NOTE)]


# -- provenance -----------------------------------------------------------------------------------------------------


def settings(config: Config, run: RunFolder) -> list[Block]:
    """The resolved config, and the versions of the packages that decide the numbers."""
    path = run.folder / ENVIRONMENT
    rows = [[name, value] for name, value in read_sealed(path).items()] if path.is_file() else []
    resolved = json.dumps(config.resolved(), indent=2, ensure_ascii=False)
    return [
        Code("Every setting, defaults included (config.json)", resolved, collapsed=True),
        Table("Where the run was started (environment.json).", ["what", "version"], rows, left=2, collapsed=True),
    ]


def reproduction(config: Config) -> list[Block]:
    """The command that makes the run again, and the one for another seed."""
    if config.is_of_script:
        return [Text("Start the script again. The same seed, machine and versions give the same choices.")]
    path = shlex.quote((config.folder / "config.json").as_posix())
    again = f"cropi run {path} run_dir=again"
    other = f"cropi run {path} name={config.name}-seed{config.seed + 1} seed={config.seed + 1}"
    return [
        Code("the same run, into another folder", again),
        Code("another seed", other),
        Text(
            "Start them from the folder where this run was started. The same machine and versions give the same "
            "selections; other hardware rounds differently. `cropi compare` compares strategies over several seeds."
        ),
    ]


RELIABILITY_CAPTION = (
    "Reliability: the share of the differences in influence that is not noise. Two scorings from other trajectories of "
    "the same prompts would correlate as much. Direction: how the validation set's own direction would correlate with "
    "one from as many other prompts. Expected: of the best ranked, how many belong among the truly best. By chance: of "
    "as many drawn at random. Errors are measured with `score.standard_errors=true`."
)
DRIFT_CAPTION = (
    "Drift of the policy from the one that sampled the stored trajectories, over the prompts with signal. Effective "
    "sample size: the median over prompts, as a share of a prompt's tokens. Clip share and KL: means."
)


def reliability(config: Config, stages: Sequence[StageQuality]) -> list[Block]:
    """Tables over the scored stages."""
    return [_reliability_table(stages, directions(config)), _drift_table(stages)]


def _reliability_table(stages: Sequence[StageQuality], names: Sequence[str]) -> Table:
    header = ["stage", *(f"reliability, {name}" for name in names), *(f"direction, {name}" for name in names)]
    rows = [
        [
            str(quality.stage),
            *(_measured(found.by_set[name] if (found := quality.reliability) else None) for name in names),
            *(_measured(quality.direction_reliability[name]) for name in names),
            *_overlap(quality.reliability),
        ]
        for quality in stages
    ]
    return Table(RELIABILITY_CAPTION, [*header, "best ranked", "expected", "by chance"], rows, left=0)


def _measured(value: float | None) -> str:
    return NOT_MEASURED if value is None else decimal(value)


def _overlap(found: Reliability | None) -> list[str]:
    if found is None:
        return [ABSENT, NOT_MEASURED, ABSENT]
    return [count(found.best), about(found.best * found.expected_overlap), about(found.best * found.chance)]


def _drift_table(stages: Sequence[StageQuality]) -> Table:
    low, high = (significant(1 + sign * CLIP_RANGE) for sign in (-1, 1))
    header = ["stage", "effective sample size", f"outside {low} to {high}", "KL per token, nats"]
    rows = [[str(quality.stage), *_drift_cells(quality.drift)] for quality in stages]
    return Table(DRIFT_CAPTION, header, rows, left=0)


def _drift_cells(drift: Drift | None) -> list[str]:
    if drift is None:
        return [NOT_MEASURED] * 3
    return [decimal(drift.ratio_ess), share(drift.clip_share), decimal(drift.kl, 3)]
