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
    SKY,
    arm_style,
    grid,
    in_style,
    new_figure,
    shortened,
    svg,
    thinned,
)
from cropi.report.reading import Selection, rows_with
from cropi.report.results import ArmSummary, Summary
from cropi.report.shares import Shares, jaccard, random_jaccard
from cropi.report.wording import percent

MAX_PANELS = 4  # histograms beside or below each other
MAX_CELLS = 12  # stages with a number in every cell
CLIP = (0.5, 99.5)  # percentiles of influence shown; what lies beyond is counted in the outermost bars
BARS = 40
PHASES = {"collect": SKY, "score": BLUE, "select": GREEN, "train": ORANGE}


@in_style
def learning_curves(summary: Summary) -> str | None:
    """Accuracy by optimiser step, all arms, with bands; the untargeted sets in a smaller panel."""
    arms = [arm for arm in summary.arms if arm.steps]
    kinds = [kind for kind in ("targeted", "untargeted") if any(_series(arm, kind) for arm in arms)]
    if not kinds:
        return None
    figure = new_figure(3.6)
    panels = figure.subplots(1, len(kinds), squeeze=False, width_ratios=[1.9, 1.0][: len(kinds)])[0]
    for axes, kind in zip(panels, kinds, strict=True):
        for arm in arms:
            _curve(axes, arm, _series(arm, kind))
        axes.set(xlabel="optimiser steps", xlim=(0, summary.total_steps * 1.02))
        axes.set_title(f"{kind} test sets: accuracy")
        axes.set_ylim(0, 1.02)
        grid(axes, "y")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(arms))
    return svg(figure, "curves")


def _series(arm: ArmSummary, kind: str) -> list[tuple[int, Interval]]:
    return [(point.step, value) for point in arm.curve if (value := getattr(point, kind)) is not None]


def _curve(axes: Axes, arm: ArmSummary, series: Sequence[tuple[int, Interval]]) -> None:
    if not series:
        return
    style = arm_style(arm.name)
    steps, means = [step for step, _ in series], [value.mean for _, value in series]
    low, high = [value.low for _, value in series], [value.high for _, value in series]
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.13, linewidth=0)
    axes.plot(steps, means, label=arm.name, **style)


@in_style
def selection_shares(shares: Mapping[str, Shares]) -> str | None:
    """By arm: how much of each stage's selection comes from each source, beside the source's share of the pool."""
    if not shares:
        return None
    sources = next(iter(shares.values())).sources
    figure = new_figure(1.0 + 0.27 * len(sources))
    widths = [2.2 + len(s.by_stage) for s in shares.values()]
    panels = figure.subplots(1, len(shares), squeeze=False, sharey=True, width_ratios=widths)[0]
    peak = max(max(column) for s in shares.values() for column in (s.pool, *s.by_stage.values()))
    for axes, (arm, table) in zip(panels, shares.items(), strict=True):
        _heat_map(axes, table, arm_style(arm)["color"], peak)
        axes.set_title(arm)
    panels[0].set_yticks([row - 0.03 for row in range(len(sources))], [shortened(source) for source in sources])
    return svg(figure, "shares")


def _heat_map(axes: Axes, table: Shares, colour: str, peak: float) -> None:
    columns = {"pool": table.pool} | {str(stage): column for stage, column in table.by_stage.items()}
    numbers = len(columns) <= MAX_CELLS + 1
    for place, (label, column) in enumerate(columns.items()):
        left = place - 0.5 + (0.25 if place else 0.0)  # a gap after the pool
        for row, share in enumerate(column):
            shade = GREY if label == "pool" else colour
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
def turnover(selections: Mapping[str, Mapping[int, Selection]], fraction: float) -> str | None:
    """By arm: overlap of each stage's selection with the one before."""
    series = {arm: jaccard(stages) for arm, stages in selections.items()}
    series = {arm: overlaps for arm, overlaps in series.items() if overlaps}
    if not series:
        return None
    figure = new_figure(2.6)
    axes = figure.subplots()
    stages = sorted({stage for overlaps in series.values() for stage in overlaps})
    for arm, overlaps in series.items():
        axes.plot(list(overlaps), list(overlaps.values()), label=arm, clip_on=False, **arm_style(arm))
    expected = random_jaccard(fraction)
    axes.axhline(expected, color=MUTED, linewidth=1, linestyle=(0, (2, 2)), label="two random draws")
    axes.set(ylim=(0, 1.02), xlabel="from stage → to stage", xlim=(min(stages) - 0.3, max(stages) + 0.3))
    axes.set_title("Jaccard overlap of consecutive selections")
    axes.set_xticks(thinned(stages), [f"{stage - 1} → {stage}" for stage in thinned(stages)])
    grid(axes, "y")
    figure.legend(loc="outside upper left", ncols=len(series) + 1)
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
def cost_split(summary: Summary) -> str | None:
    """Seconds by arm: collection, scoring, selecting and training, one after the other."""
    arms = [arm for arm in summary.arms if arm.cost.total is not None]
    if not arms:
        return None
    figure = new_figure(0.95 + 0.42 * len(arms))
    axes = figure.subplots()
    ends = np.zeros(len(arms))
    for phase, colour in PHASES.items():
        spent = np.array([getattr(arm.cost, phase) or 0.0 for arm in arms])
        if spent.any():
            axes.barh(range(len(arms)), spent, left=ends, height=0.62, color=colour, label=phase, alpha=0.85)
        ends += spent
    for place, arm in enumerate(arms):
        text, at = f"selection {percent(arm.cost.selection_share)} of training", (float(ends[place]), place)
        if arm.cost.score:
            axes.annotate(text, at, (6, 0), textcoords="offset points", va="center", fontsize=8, color=MUTED)
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.set(xlabel="seconds", ylim=(len(arms) - 0.5, -0.5), xlim=(0, max(float(ends.max()), 1e-9) * 1.25))
    grid(axes, "x")
    figure.legend(loc="outside upper left", ncols=len(PHASES))
    return svg(figure, "cost")
