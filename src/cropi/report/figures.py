"""The report's figures. Each function returns one `<svg>` element, or None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from cropi.functional.bootstrap import Interval
from cropi.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    MUTED,
    ORANGE,
    OTHER_MARKS,
    PINK,
    SKY,
    grid,
    in_style,
    new_figure,
    panel_grid,
    shortened,
    strategy_style,
    svg,
    thinned,
)
from cropi.report.reading import Selection, rows_with
from cropi.report.results import Cost, Summary
from cropi.report.shares import Shares, random_jaccard
from cropi.report.wording import percent

MAX_PANELS = 4  # histograms beside or below each other
MAX_CELLS = 12  # stages with a number in every cell
CLIP = (0.5, 99.5)  # percentiles of influence shown; what lies beyond is counted in the outermost bars
BARS = 40
KIND_COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, GREY)
PHASES = {"collect": SKY, "score": BLUE, "select": GREEN, "train": ORANGE}


@in_style
def learning_curves(summary: Summary) -> str | None:
    """Accuracy by optimiser step, with bands; the untargeted sets in a smaller panel."""
    kinds = [kind for kind in ("targeted", "untargeted") if _series(summary, kind)]
    if not kinds or not summary.steps:
        return None
    figure = new_figure(3.6)
    panels = figure.subplots(1, len(kinds), squeeze=False, width_ratios=[1.9, 1.0][: len(kinds)])[0]
    for axes, kind in zip(panels, kinds, strict=True):
        _curve(axes, summary.strategy, _series(summary, kind))
        axes.set(xlabel="optimiser steps", xlim=(0, summary.total_steps * 1.02))
        axes.set_title(f"{kind} test sets: accuracy")
        axes.set_ylim(0, 1.02)
        grid(axes, "y")
    return svg(figure, "curves")


def _series(summary: Summary, kind: str) -> list[tuple[int, Interval]]:
    return [(point.step, value) for point in summary.curve if (value := getattr(point, kind)) is not None]


def _curve(axes: Axes, strategy: str, series: Sequence[tuple[int, Interval]]) -> None:
    style = strategy_style(strategy)
    steps, means = [step for step, _ in series], [value.mean for _, value in series]
    low, high = [value.low for _, value in series], [value.high for _, value in series]
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.13, linewidth=0)
    axes.plot(steps, means, **style)


@in_style
def selection_shares(shares: Shares, name: str = "shares") -> str:
    """Draw each source's share of the pool and of every stage's selection."""
    figure = new_figure(1.0 + 0.27 * len(shares.sources))
    axes = figure.subplots()
    _heat_map(axes, shares, max(max(column) for column in (shares.pool, *shares.by_stage.values())))
    places = [row - 0.03 for row in range(len(shares.sources))]
    axes.set_yticks(places, [shortened(source) for source in shares.sources])
    return svg(figure, name)


def _heat_map(axes: Axes, table: Shares, peak: float) -> None:
    columns = {"pool": table.pool} | {str(stage): column for stage, column in table.by_stage.items()}
    numbers = len(columns) <= MAX_CELLS + 1
    for place, (label, column) in enumerate(columns.items()):
        left = place - 0.5 + (0.25 if place else 0.0)  # a gap after the pool
        for row, share in enumerate(column):
            shade = GREY if label == "pool" else BLUE
            axes.add_patch(Rectangle((left, row - 0.5), 0.96, 0.94, color=shade, alpha=0.6 * share / peak, linewidth=0))
            if numbers:
                text = f"{100 * share:.0f}" if share else "·"
                axes.text(left + 0.48, row - 0.03, text, ha="center", va="center", fontsize=8)
    axes.set(xlim=(-0.6, len(columns) - 0.1), ylim=(len(table.sources) - 0.45, -0.55), xlabel="stage")
    ticks = [place + (0.23 if place else -0.02) for place in range(len(columns))]
    every = 1 if numbers else -(-len(columns) // MAX_CELLS)
    axes.set_xticks(ticks[::every], list(columns)[::every])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


@in_style
def turnover(overlaps: Mapping[int, float], fraction: float) -> str:
    """Overlap of each stage's selection with the one before, by the later stage."""
    figure = new_figure(2.6)
    axes = figure.subplots()
    stages = sorted(overlaps)
    axes.plot(list(overlaps), list(overlaps.values()), label="selections", clip_on=False, color=BLUE, marker="o")
    expected = random_jaccard(fraction)
    axes.axhline(expected, color=MUTED, linewidth=1, linestyle=(0, (2, 2)), label="two random draws")
    axes.set(ylim=(0, 1.02), xlabel="from stage → to stage", xlim=(min(stages) - 0.3, max(stages) + 0.3))
    axes.set_title("Jaccard overlap of consecutive selections")
    axes.set_xticks(thinned(stages), [f"{stage - 1} → {stage}" for stage in thinned(stages)])
    grid(axes, "y")
    figure.legend(loc="outside upper left", ncols=2)
    return svg(figure, "turnover")


@in_style
def score_distributions(
    scores: Mapping[int, pa.Table], selections: Mapping[int, Selection], validation_sets: Sequence[str]
) -> str | None:
    """Histograms of influence: every prompt that has a signal, and those selected; one panel per set and stage."""
    if not scores:
        return None
    stages, names = thinned(sorted(scores), MAX_PANELS), list(validation_sets)[:MAX_PANELS]
    figure = new_figure(0.7 + 1.75 * len(stages))
    panels = figure.subplots(len(stages), len(names), squeeze=False, sharex="col")
    for row, stage in enumerate(stages):
        table = rows_with(scores[stage])
        chosen = selections[stage].chosen if stage in selections else frozenset()
        mask = np.array([i in chosen for i in table.column("prompt_id").to_pylist()], dtype=bool)
        for column, name in enumerate(names):
            axes = panels[row][column]
            _histogram(axes, table.column(f"influence/{name}").to_numpy(), mask)
            axes.set_title(f"{shortened(name)}, stage {stage}")
            grid(axes, "y")
    for axes in panels[-1]:
        axes.set_xlabel("influence")
    for row_panels in panels:
        row_panels[0].set_ylabel("share of prompts")
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
    return svg(figure, "scores")


def _histogram(axes: Axes, values_N: np.ndarray, selected_N: np.ndarray) -> None:
    if not len(values_N):
        return
    low, high = np.percentile(values_N, CLIP)
    edges = np.linspace(low, high if high > low else low + 1.0, BARS + 1)
    for label, part, colour, alpha in (("all", values_N, GREY, 0.5), ("selected", values_N[selected_N], BLUE, 0.6)):
        if len(part):
            counts, _ = np.histogram(np.clip(part, low, edges[-1]), edges)
            axes.stairs(counts / len(part), edges, fill=True, label=label, color=colour, alpha=alpha, linewidth=0)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))


@in_style
def influence_by_kind(
    found: Mapping[str, Mapping[str, Mapping[int, tuple[float, float]]]], kinds: Sequence[str]
) -> str:
    """Draw mean influence with its error by step: a panel for each validation set, a line for each kind of prompt."""
    names = list(found)[:MAX_PANELS]
    figure, panels = panel_grid(len(names), 2.4)
    for axes, name in zip(panels, names, strict=True):
        for number, kind in enumerate(kinds):
            by_step = found[name].get(kind, {})
            steps, colour, mark = list(by_step), KIND_COLOURS[number % 6], OTHER_MARKS[number % 7]
            means_S, errors_S = np.array(list(by_step.values())).reshape(-1, 2).T
            axes.fill_between(steps, means_S - errors_S, means_S + errors_S, color=colour, alpha=0.13, linewidth=0)
            axes.plot(steps, means_S, color=colour, marker=mark, label=shortened(kind))
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set(xlabel="optimiser steps")
        axes.set_title(f"influence on {shortened(name)}")
        grid(axes, "y")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return svg(figure, "beliefs")


@in_style
def gain_of_choosing(gains: Mapping[int, tuple[float, float, float]]) -> str | None:
    """Draw by step how many times more a chosen prompt helps than a random one, with its interval."""
    if not gains:
        return None
    figure = new_figure(2.6)
    axes = figure.subplots()
    middle, low, high = zip(*gains.values(), strict=True)
    axes.fill_between(list(gains), low, high, color=BLUE, alpha=0.13, linewidth=0)
    axes.plot(list(gains), middle, color=BLUE, marker="o")
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
    least, most = float(np.min(middle)), float(np.max(middle))
    axes.set(xlabel="optimiser steps", ylim=(min(0.0, 2 * least), max(2.0, 2 * most)))  # wide intervals are cut
    axes.set_title("help of a chosen prompt ÷ help of a random one")
    grid(axes, "y")
    return svg(figure, "gain")


@in_style
def cost_split(cost: Cost) -> str | None:
    """Seconds of collection, scoring, selecting and training, one after the other."""
    if cost.total is None:
        return None
    figure = new_figure(1.4)
    axes = figure.subplots()
    end = 0.0
    for phase, colour in PHASES.items():
        spent = getattr(cost, phase) or 0.0
        if spent:
            axes.barh([0], [spent], left=[end], height=0.62, color=colour, label=phase, alpha=0.85)
        end += spent
    if cost.score:
        text = f"selection {percent(cost.selection_share)} of training"
        axes.annotate(text, (end, 0), (6, 0), textcoords="offset points", va="center", fontsize=8, color=MUTED)
    axes.set_yticks([])
    axes.set(xlabel="seconds", ylim=(0.5, -0.5), xlim=(0, max(end, 1e-9) * 1.25))
    grid(axes, "x")
    figure.legend(loc="outside upper left", ncols=len(PHASES))
    return svg(figure, "cost")
