"""Figures of what a ranking is worth: influence with error bars, and reliability and drift by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cropi.artifacts import OK
from cropi.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    MUTED,
    ORANGE,
    PINK,
    grid,
    in_style,
    new_figure,
    shortened,
    svg,
    thinned,
)
from cropi.report.reading import Selection, rows_of
from cropi.report.results import StageQuality

MAX_BARS = 120  # prompts of a panel, evenly spread over all that it stands for
MAX_SETS = 4
COLUMNS = 3
SET_COLOURS = (BLUE, ORANGE, GREEN, PINK)

Row = Mapping[str, Any]  # of the score table


@in_style
def influence_errors(
    table: pa.Table, selection: Selection, validation_sets: Sequence[str], chance: float
) -> str | None:
    """Selected prompts and as many that follow, with error bars by validation set, and their chances to be truly best.

    `chance` is that of a prompt drawn at random.
    """
    rows = shown_rows(table, selection)
    if not any(row["top_probability"] is not None for row in rows):
        return None
    names = list(validation_sets)[:MAX_SETS]
    figure, panels = _panels(len(names) + 1)
    for axes, name in zip(panels, names, strict=False):
        _error_bars(axes, rows, name, selection.chosen)
    _chances(panels[-1], rows, selection.chosen, chance)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, markerscale=2.0)
    return svg(figure, "errors")


def shown_rows(table: pa.Table, selection: Selection) -> Sequence[Row]:
    """Rows with signal of the selected prompts and of as many that follow them, in the order of the ranking."""
    chosen = selection.chosen
    known = rows_of(table, selection.prompt_ids)
    ranked = [known[i] for i in selection.prompt_ids if known[i]["status"] == OK]
    room, kept = len(chosen), []
    for row in ranked:
        taken = row["prompt_id"] in chosen
        if taken or room:
            kept.append(row)
            room -= not taken
    return kept


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """`count` panels in rows of COLUMNS."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = new_figure(0.5 + 2.5 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def _error_bars(axes: Axes, rows: Sequence[Row], name: str, chosen: frozenset[str]) -> None:
    """One bar of two standard errors for every prompt, the largest influence first."""
    order = sorted(rows, key=lambda row: (-row[f"influence/{name}"], row["prompt_id"]))
    places = thinned(range(len(order)), MAX_BARS)
    for label, colour, wanted in (("selected", BLUE, True), ("next in rank", GREY, False)):
        drawn = [place for place in places if (order[place]["prompt_id"] in chosen) == wanted]
        values = np.array([order[place][f"influence/{name}"] for place in drawn])
        errors = np.array([order[place][f"standard_error/{name}"] for place in drawn], dtype=np.float64)
        at = [place + 1 for place in drawn]
        axes.vlines(at, values - errors, values + errors, color=colour, linewidth=1.1, alpha=0.55)
        axes.plot(at, values, "o", color=colour, markersize=2.6, markeredgewidth=0, label=label)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    axes.set_title(f"{shortened(name)}: influence ± error")
    axes.set_xlabel("prompts, sorted")
    grid(axes, "y")


def _chances(axes: Axes, rows: Sequence[Row], chosen: frozenset[str], chance: float) -> None:
    """Each prompt's probability of being truly among the best, in the order of the fused ranking."""
    places = thinned(range(len(rows)), MAX_BARS)
    for colour, wanted in ((BLUE, True), (GREY, False)):
        drawn = [place for place in places if (rows[place]["prompt_id"] in chosen) == wanted]
        values = [rows[place]["top_probability"] for place in drawn]
        axes.plot([place + 1 for place in drawn], values, "o", color=colour, markersize=3.4, markeredgewidth=0)
    axes.axhline(chance, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
    axes.set_title("probability of being among the truly best")
    axes.set_xlabel("prompts, by fused rank")
    axes.set_ylim(-0.02, 1.02)
    grid(axes, "y")


@in_style
def quality_by_stage(stages: Sequence[StageQuality], validation_sets: Sequence[str]) -> str | None:
    """Reliability and the drift of the policy by stage; None before there are two stages with drift."""
    moved = [(worth.stage, worth.drift) for worth in stages if worth.drift is not None]
    if len(moved) < 2:
        return None
    measured = [(worth.stage, worth.reliability) for worth in stages if worth.reliability is not None]
    figure = new_figure(2.5)
    panels = figure.subplots(1, 3 + bool(measured), squeeze=False)[0]
    if measured:
        for name, colour in zip(validation_sets, SET_COLOURS, strict=False):
            values = [found.by_set[name] for _, found in measured]
            panels[0].plot([s for s, _ in measured], values, marker="o", color=colour, label=shortened(name, 16))
        panels[0].set_title("reliability")
        panels[0].legend(fontsize=8)
    titles = {"ratio_ess": "effective sample size", "clip_share": "clip share", "kl": "KL per token, nats"}
    for axes, (fact, title) in zip(panels[-3:], titles.items(), strict=True):
        axes.plot([s for s, _ in moved], [getattr(drift, fact) for _, drift in moved], marker="o", color=MUTED)
        axes.set_title(title)
    for axes in panels:
        highest = 1.05 if axes is not panels[-1] else 1.05 * max(drift.kl for _, drift in moved) or 1.0
        axes.set(xlabel="stage", ylim=(0, highest), xticks=thinned([s for s, _ in moved], 8))
        grid(axes, "y")
    return svg(figure, "worth")
