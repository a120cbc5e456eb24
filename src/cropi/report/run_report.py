"""The report of a run: one self-contained HTML page, the same in Markdown, and the numbers in JSON."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cropi.artifacts import PROMPT_TOO_LONG, count_status, is_finished, read_sealed, write_json
from cropi.config import Config
from cropi.functional.bootstrap import CONFIDENCE
from cropi.report import figures
from cropi.report.blocks import Block, Code, Picture, Section, Table, Text
from cropi.report.choosing import choosing
from cropi.report.closeups import closeups
from cropi.report.headline import headline
from cropi.report.reading import (
    Selection,
    directions,
    group_statuses,
    prompts_left_out,
    read_scores,
    read_selections,
    read_verdicts,
    rows_with,
)
from cropi.report.reliability import reliability
from cropi.report.rendering import write_report
from cropi.report.shares import jaccard, share_table, source_shares
from cropi.report.summary import Summary, summarise
from cropi.report.wording import ABSENT, count, decimal, percent, share, significant, tenths, with_interval
from cropi.run_folder import ENVIRONMENT, RunFolder

COST_NOTE = (
    "The total is collect + score + select + train. Collection before training counts only where the strategy reads "
    "the stored trajectories. Evaluation stands beside the total, not in it. Training seconds are those of the "
    "optimiser steps, rollouts included, that led to the final weights. Work lost to an interruption counts for "
    "collection, scoring and selection, and not for training."
)


def make_report(run: RunFolder) -> Summary:
    """Write `report.html`, `report.md` and `summary.json` to a run's folder, from what the folder holds.

    A run may be reported at any time: what is not there yet is left out and said to be. The same folder gives the same
    bytes. Raises ArtifactError where a file of the run is corrupt.
    """
    config, folder = run.config, run.folder
    summary = summarise(config, run)
    write_report(folder, "report", f"cropi run {config.name}", sections(read_contents(config, run, summary)))
    write_json(folder / "summary.json", summary.as_json())
    return summary


@dataclass(frozen=True)
class Contents:
    """Everything that the sections are made from, read once."""

    config: Config
    run: RunFolder
    summary: Summary
    selections: Mapping[int, Selection]  # by stage
    scores: Mapping[int, pa.Table]  # influence, by stage


def read_contents(config: Config, run: RunFolder, summary: Summary) -> Contents:
    """Read selections and scores, as far as they are there."""
    selections = read_selections(run.stages, config.train.stages)
    return Contents(config, run, summary, selections, read_scores(config, run.stages))


def sections(found: Contents) -> list[Section]:
    """The report, in order."""
    online = found.config.select.strategy.reads_influence
    return [
        Section("Result", _result(found.summary)),
        Section("Learning curves", _curves(found.summary)),
        Section("What was selected", _selected(found)),
        Section("Turnover between stages", _turnover(found)),
        Section("Distribution of the scores", _distributions(found)),
        Section("Can the ranking be trusted?", _reliability(found)),
        Section("What became of every prompt", funnel(found.run, found.selections, found.scores)),
        Section("Cost", _cost(found.summary)),
        *([Section("Belief, choice and their cost", choosing(found.config, found.run))] if online else []),
        Section("Prompts, close up", closeups(found.config, found.run, found.scores)),
        Section("Settings", settings(found.config, found.run)),
        Section("How to reproduce it", reproduction(found.config)),
    ]


# -- result and curves ---------------------------------------------------------------------------------------------


def _result(summary: Summary) -> list[Block]:
    blocks: list[Block] = [Text(headline(summary), lead=True)]
    points = [("base policy", summary.base), (f"`{summary.strategy}`", summary.last)]
    rows = [
        [name, str(point.step), with_interval(point.targeted), with_interval(point.untargeted)]
        for name, point in points
        if point is not None
    ]
    if not rows:
        return blocks
    caption = (
        "Greedy accuracy at the last evaluated step: the mean over test sets, with its interval over questions. "
        f"Evaluated every {summary.evaluate_every} steps."
    )
    header = ["policy", "steps", "targeted", "untargeted"]
    return [*blocks, Table(caption, header, rows, strong=len(rows) - 1), *_by_set(summary)]


def _by_set(summary: Summary) -> list[Block]:
    """Accuracy by test set; no table where there is one set only."""
    columns = {"base policy": summary.base_by_set} | ({summary.strategy: summary.final} if summary.final else {})
    names = list(dict.fromkeys(name for by_set in columns.values() for name in by_set))
    keys = [(name, kind) for name in names for kind in ("greedy", "sampled")]
    rows = [
        [name, kind, *(with_interval(by_set.get(name, {}).get(kind)) for by_set in columns.values())]
        for name, kind in keys
        if any(kind in by_set.get(name, {}) for by_set in columns.values())
    ]
    return [Table("Accuracy by test set.", ["test set", "answers", *columns], rows, left=2)] if len(rows) > 1 else []


def _curves(summary: Summary) -> list[Block]:
    drawn = figures.learning_curves(summary)
    if drawn is None:
        text = "Training has not been evaluated yet." if summary.tested else "There is no test set to evaluate on."
        return [Text(text), *_rewards(summary)]
    level = percent(CONFIDENCE)
    caption = f"Greedy accuracy, mean over test sets. Bands: {level} bootstrap intervals over questions, one seed."
    rows = [[str(p.step), with_interval(p.targeted), with_interval(p.untargeted)] for p in summary.curve]
    curves = Table("Accuracy by step.", ["step", "targeted", "untargeted"], rows, left=0, collapsed=True)
    return [Picture(drawn, caption), curves, *_rewards(summary)]


def _rewards(summary: Summary) -> list[Block]:
    if not summary.rewards:
        return []
    caption = "Mean reward of the completions that training sampled, by stage: each on the prompts of its own stage."
    rows = [[str(stage), decimal(reward)] for stage, reward in enumerate(summary.rewards)]
    return [Table(caption, ["stage", "mean reward"], rows, left=0)]


# -- selections ----------------------------------------------------------------------------------------------------


def _selected(found: Contents) -> list[Block]:
    if not found.selections:
        return [Text("Nothing has been selected yet.")]
    shares = source_shares(found.selections)
    caption = "Share of each source in %, in the pool and in the selection of every stage."
    return [Picture(figures.selection_shares(shares), caption), share_table(shares, "Prompts selected, by source.")]


def _turnover(found: Contents) -> list[Block]:
    rows, overlaps = [], jaccard(found.selections)
    for stage, overlap in overlaps.items():
        before, now = found.selections[stage - 1].chosen, found.selections[stage].chosen
        numbers = (count(len(part)) for part in (before & now, now - before, before - now))
        rows.append([f"{stage - 1} → {stage}", *numbers, decimal(overlap)])
    if not rows:
        return [Text("There are no two consecutive selections.")]
    shares = [len(selection.chosen) / len(selection.selected) for selection in found.selections.values()]
    drawn = figures.turnover(overlaps, float(np.mean(shares)))
    caption = "1: the same prompts again; 0: none of them. Dotted: what two independent random draws would share."
    header = ["stages", "kept", "new", "dropped", "overlap"]
    table = Table("Prompts kept, new and dropped. Overlap: kept ÷ (kept + new + dropped).", header, rows, left=1)
    return [Picture(drawn, caption), table]


def _distributions(found: Contents) -> list[Block]:
    if not found.scores:
        return [Text(_unscored(found.config))]
    names, chosen = directions(found.config), found.selections
    drawn = figures.score_distributions(found.scores, chosen, names)
    caption = (
        f"Influence of the training prompts on each validation set (`{found.config.score.score}`): all prompts with a "
        "signal, and those selected. Prompts without one are left out; the outermost bars hold what lies beyond. At "
        f"most {figures.MAX_PANELS} sets and stages are drawn."
    )
    rows = [
        [name, str(stage), *_quantiles(table, name, chosen.get(stage))]
        for name in names
        for stage, table in found.scores.items()
    ]
    header = ["validation set", "stage", "prompts", "5 %", "median", "95 %", "selected", "their median"]
    title = "Influence: quantiles over all prompts with a signal, and over those selected."
    table = Table(title, header, rows, left=1)
    return [*([Picture(drawn, caption)] if drawn else []), table]


def _quantiles(table: pa.Table, name: str, selection: Selection | None) -> list[str]:
    with_signal = rows_with(table)
    values_N = with_signal.column(f"influence/{name}").to_numpy()
    if not len(values_N):
        return ["0", *([ABSENT] * 5)]
    cells = [count(len(values_N)), *(significant(float(value)) for value in np.percentile(values_N, (5, 50, 95)))]
    if selection is None:
        return [*cells, ABSENT, ABSENT]
    taken_N = np.isin(with_signal.column("prompt_id").to_pylist(), list(selection.chosen))
    median = significant(float(np.median(values_N[taken_N]))) if taken_N.any() else ABSENT
    return [*cells, count(int(taken_N.sum())), median]


def _reliability(found: Contents) -> list[Block]:
    if not found.scores:
        return [Text(_unscored(found.config))]
    return reliability(found.config, found.summary.stages, found.scores, found.selections)


def _unscored(config: Config) -> str:
    """Say whether influence is still to come or never will."""
    if config.select.strategy.reads_scores:
        return "Influence has not been computed yet."
    if config.select.strategy.chooses_online:
        return f"`{config.select.label}` reads influence while it trains and scores no prompts beforehand."
    return f"This run computes no influence: `{config.select.label}` chooses without it."


# -- statuses ----------------------------------------------------------------------------------------------------------

Rows = list[list[str]]


def funnel(run: RunFolder, selections: Mapping[int, Selection], scores: Mapping[int, pa.Table]) -> list[Block]:
    """Tables of statuses and verdicts, as far as the run has come."""
    verdicts = read_verdicts(run)
    rows = _prompt_rows(run)
    if verdicts is not None:
        rows += _trajectory_rows(run, verdicts)
        rows += _status_rows("training groups", "", group_statuses(verdicts).values())
    for stage, table in scores.items():
        rows += _status_rows("scores", f"influence, stage {stage}", table.column("status").to_pylist())
    for stage, selection in selections.items():
        taken, pool = sum(selection.selected), len(selection.selected)
        rows.append(["selection", f"stage {stage}", "selected", count(taken), share(taken / max(pool, 1))])
    if not rows:
        return [Text("There are no prompts yet.")]
    caption = (
        "Rows by status. A group is mixed when its completions are rewarded unlike; a group without signal has a "
        "gradient of zero."
    )
    table = Table(caption, ["step", "of", "status", "rows", "share"], rows, left=3)
    return [table, *([_verdicts(verdicts)] if verdicts is not None else [])]


def _prompt_rows(run: RunFolder) -> Rows:
    if not is_finished(run.prompts):
        return []
    by_set = Counter(row["set"] for row in run.prompt_rows)
    return [["prompts", name, "", count(number), ""] for name, number in by_set.items()]


def _trajectory_rows(run: RunFolder, verdicts: pa.Table) -> Rows:
    rows: Rows = []
    if skipped := prompts_left_out(run):
        rows.append(["prompts", "all sets but test", PROMPT_TOO_LONG, count(skipped), ""])
    for name, table in _verdicts_by_set(verdicts).items():
        rows += _status_rows("trajectories", name, table.column("status").to_pylist())
    return rows


def _verdicts(verdicts: pa.Table) -> Table:
    rows: Rows = []
    for name, table in _verdicts_by_set(verdicts).items():
        rows += [row[1:] for row in _status_rows("", name, table.column("verdict").to_pylist())]
    return Table("Verdicts on the stored trajectories.", ["of", "verdict", "completions", "share"], rows, left=2)


def _verdicts_by_set(verdicts: pa.Table) -> dict[str, pa.Table]:
    """Rows by set, the training set first."""
    names = sorted(pc.unique(verdicts.column("set")).to_pylist(), key=lambda name: (name != "train", name))
    return {name: verdicts.filter(pc.equal(verdicts.column("set"), name)) for name in names}


def _status_rows(step: str, of: str, statuses: Iterable[str]) -> Rows:
    counts = count_status(statuses)
    total = sum(counts.values())
    return [[step, of, status, count(number), share(number / total)] for status, number in counts.items()]


# -- cost ----------------------------------------------------------------------------------------------------------


def _cost(summary: Summary) -> list[Block]:
    cost = summary.cost
    phases = ("collect", "score", "select", "train", "total", "evaluate")
    if all(getattr(cost, phase) is None for phase in phases):
        return [Text("Nothing has been spent yet.")]
    row = [
        *(tenths(getattr(cost, phase)) for phase in phases),
        share(cost.selection_share),
        count(cost.collect_tokens),
        count(cost.train_tokens),
    ]
    header = [*phases, "(score + select) ÷ train", "tokens collected", "tokens in training"]
    drawn = figures.cost_split(cost)
    blocks: list[Block] = [Picture(drawn, "Seconds, evaluation left out.")] if drawn else []
    return [*blocks, Table("Seconds by phase, and generated tokens.", header, [row], left=0), Text(COST_NOTE)]


# -- provenance -----------------------------------------------------------------------------------------------------


def settings(config: Config, run: RunFolder) -> list[Block]:
    """The resolved config, and the versions of the packages that decide the numbers."""
    rows = [[name, value] for name, value in _environment(run).items()]
    resolved = json.dumps(config.resolved(), indent=2, ensure_ascii=False)
    return [
        Code("Every setting, defaults included (config.json)", resolved, collapsed=True),
        Table("Where the run was started (environment.json).", ["what", "version"], rows, left=2, collapsed=True),
    ]


def reproduction(config: Config) -> list[Block]:
    """The command that makes the run again, and the one for another seed."""
    path = shlex.quote((config.folder / "config.json").as_posix())
    again = f"cropi run {path} run_dir=again"
    other = f"cropi run {path} name={config.name}-seed{config.seed + 1} seed={config.seed + 1}"
    return [
        Text(
            f"The seed of this run is {config.seed}. `config.json` in the run's folder is a complete config: the one "
            "under Settings. From the folder where the run was started:"
        ),
        Code("the same run, into another folder", again),
        Code("another seed", other),
        Text(
            "The same machine and versions give the same selections; other hardware rounds differently. To compare "
            "strategies over several seeds: `cropi compare`."
        ),
    ]


def _environment(run: RunFolder) -> dict[str, str]:
    """The machine and package versions that the run recorded at its start."""
    path = run.folder / ENVIRONMENT
    return read_sealed(path) if path.is_file() else {}
