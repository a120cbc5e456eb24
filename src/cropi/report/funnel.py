"""The funnel: rows by status from the prompts to the selections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from cropi.artifacts import PROMPT_TOO_LONG, count_status, is_finished
from cropi.report.blocks import Block, Table, Text
from cropi.report.reading import Selection, group_statuses, prompts_left_out, read_verdicts
from cropi.report.wording import count, share
from cropi.run_folder import RunFolder

Rows = list[list[str]]


def funnel(run: RunFolder, selections: Mapping[int, Selection], scores: Mapping[int, pa.Table]) -> list[Block]:
    """Tables of statuses and verdicts, as far as the run has come."""
    verdicts = read_verdicts(run)
    rows = _prompts(run)
    if verdicts is not None:
        rows += _trajectories(run, verdicts)
        rows += _shares("training groups", "", group_statuses(verdicts).values())
    for stage, table in scores.items():
        rows += _shares("scores", f"influence, stage {stage}", table.column("status").to_pylist())
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


def _prompts(run: RunFolder) -> Rows:
    if not is_finished(run.prompts):
        return []
    by_set = Counter(row["set"] for row in run.prompt_rows)
    return [["prompts", name, "", count(number), ""] for name, number in by_set.items()]


def _trajectories(run: RunFolder, verdicts: pa.Table) -> Rows:
    rows: Rows = []
    if skipped := prompts_left_out(run):
        rows.append(["prompts", "all sets but test", PROMPT_TOO_LONG, count(skipped), ""])
    for name, table in _by_set(verdicts).items():
        rows += _shares("trajectories", name, table.column("status").to_pylist())
    return rows


def _verdicts(verdicts: pa.Table) -> Table:
    rows: Rows = []
    for name, table in _by_set(verdicts).items():
        rows += [row[1:] for row in _shares("", name, table.column("verdict").to_pylist())]
    return Table("Verdicts on the stored trajectories.", ["of", "verdict", "completions", "share"], rows, left=2)


def _by_set(verdicts: pa.Table) -> dict[str, pa.Table]:
    """Rows by set, the training set first."""
    names = sorted(pc.unique(verdicts.column("set")).to_pylist(), key=lambda name: (name != "train", name))
    return {name: verdicts.filter(pc.equal(verdicts.column("set"), name)) for name in names}


def _shares(step: str, of: str, statuses: Iterable[str]) -> Rows:
    counts = count_status(statuses)
    total = sum(counts.values())
    return [[step, of, status, count(number), share(number / total)] for status, number in counts.items()]
