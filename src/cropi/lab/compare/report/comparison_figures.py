"""The figures of a comparison. Each function returns one `<svg>` element, or None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cropi.lab.compare.paired_runs import Comparison, interval
from cropi.lab.compare.report.accuracy_bands import Band
from cropi.lab.compare.report.ratio_format import UNITS, censored
from cropi.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PINK,
    SKY,
    STRATEGY_STYLES,
    grid,
    in_style,
    new_figure,
    panel_grid,
    shortened,
    svg,
    thinned,
)
from cropi.report.figures import PHASES
from cropi.report.wording import share, si_prefix

AMBER = "#e69f00"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER, GREY, INK)
MARKS = ("o", "s", "D", "v", "P", "X", "^", "*")
DASHES = ("-", (0, (5, 1)), "-.", (0, (1, 1)))
LABEL = 24  # letters of a name in a figure
RATIOS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
FINE_RATIOS = (0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 2.8, 4)
UPRIGHT = 4  # so many names fit beside each other

Styles = Mapping[str, Mapping[str, Any]]


def styles(strategies: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A look for every strategy, the same in all figures of a page. The first eight have colours of their own.

    A strategy that the report of a run knows has the look that it has there.
    """
    looks = {name: dict(STRATEGY_STYLES[name]) for name in strategies if name in STRATEGY_STYLES}
    taken = [look["color"] for look in looks.values()]
    free = [place for place, colour in enumerate(COLOURS) if colour not in taken]
    others = [name for name in strategies if name not in looks]
    for number, name in enumerate(others):
        turn = number - len(free)
        place = free[number] if turn < 0 else turn % len(COLOURS)
        dash = DASHES[0] if turn < 0 else DASHES[1 + turn // len(COLOURS) % 3]
        mark = MARKS[place] if turn < 0 else MARKS[(place + 3) % len(MARKS)]
        looks[name] = {"color": COLOURS[place], "marker": mark, "linestyle": dash}
    return {name: looks[name] for name in strategies}


@in_style
def speedup_intervals(comparison: Comparison, looks: Styles) -> str | None:
    """By strategy: speed-up with its interval, and that of every scenario as a tick."""
    measures = [m for m in UNITS if any(m in e["speedup"] for e in comparison.summary["entries"])]
    target, entries = comparison.summary["target"], comparison.entries(comparison.scope)
    names = [name for name in comparison.strategies if name in entries and name != target]
    if not measures or not names:
        return None
    figure = new_figure(0.9 + 0.3 * len(names))
    panels = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
    for axes, measure in zip(panels, measures, strict=True):
        for place, name in enumerate(names):
            _whisker(axes, place, entries[name], measure, looks[name])
            parts = [comparison.entries(s).get(name) for s in comparison.scenarios if comparison.scope != s]
            ticks = [e["speedup"][measure]["mean"] for e in parts if e is not None and measure in e["speedup"]]
            axes.plot(ticks, [place + 0.24] * len(ticks), "|", color=looks[name]["color"], markersize=5, alpha=0.7)
        axes.axvline(1, color=MUTED, linewidth=0.8)
        axes.set(xscale="log", ylim=(len(names) - 0.5, -0.5))
        axes.set_title(UNITS[measure])
        _ratio_ticks(axes)
        grid(axes, "x")
    panels[0].set_yticks(range(len(names)), [shortened(name, LABEL) for name in names])
    figure.supxlabel(f"times sooner than {shortened(target, LABEL)} (logarithmic)", fontsize=9)
    return svg(figure, "speedups")


def _whisker(axes: Axes, place: int, entry: Mapping[str, Any], measure: str, look: Mapping[str, Any]) -> None:
    found = interval(entry["speedup"].get(measure))
    if found is None:
        return
    axes.plot([found.low, found.high], [place, place], color=look["color"], linewidth=2)
    fill = "none" if censored(entry) else look["color"]
    axes.plot([found.mean], [place], marker="o", markersize=6, color=look["color"], markerfacecolor=fill)


def _ratio_ticks(axes: Axes) -> None:
    """Round ratios, three to six of them: the coarsest of these lists that has three inside."""
    low, high = axes.get_xlim()
    lists = ((0.001, 0.01, 0.1, 1, 10, 100), (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30), RATIOS, FINE_RATIOS)
    found = [[ratio for ratio in ratios if low <= ratio <= high] for ratios in lists]
    ticks = next((inside for inside in found if len(inside) > 2), found[-1])
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


@in_style
def accuracy_curves(
    found: Mapping[str, Mapping[str, Band]], measure: str, looks: Styles, main: str | None, target: str
) -> str | None:
    """Targeted accuracy with bands, a panel for every scenario. Dotted: where `target` ends."""
    shown = {scenario: bands for scenario, bands in found.items() if bands}
    if not shown:
        return None
    figure, panels = panel_grid(len(shown), 2.2)
    longest = max(float(band.at[-1]) for bands in shown.values() for band in bands.values())
    scale, unit = axis_unit(measure, longest)
    for axes, (scenario, bands) in zip(panels, shown.items(), strict=True):
        for name in sorted(bands, key=lambda name: name == main):  # the main one on top
            band, look = bands[name], looks[name]
            axes.fill_between(band.at / scale, band.low, band.high, color=look["color"], alpha=0.1, linewidth=0)
            every = max(1, len(band.at) // 5)
            width = 2.2 if name == main else 1.3
            axes.plot(band.at / scale, band.mean, label=name, markevery=(every, every), linewidth=width, **look)
        if target in bands:
            axes.axhline(float(bands[target].mean[-1]), color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        axes.set_title(shortened(scenario, LABEL))
        axes.set_xlim(left=0)
        grid(axes, "y")
    figure.supxlabel(unit, fontsize=9)
    legend(figure, looks, [name for name in looks if any(name in bands for bands in shown.values())])
    return svg(figure, f"curves-{measure}")


def legend(figure: Figure, looks: Styles, names: Sequence[str]) -> None:
    """One legend above all panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=shortened(name, LABEL), **looks[name]) for name in names]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(names)))


def axis_unit(measure: str, longest: float) -> tuple[float, str]:
    """Divisor and label of an axis."""
    if measure == "seconds":
        return (3600.0, "hours") if longest >= 7200 else (60.0, "minutes") if longest >= 300 else (1.0, "seconds")
    if measure == "steps":
        return 1.0, "optimiser steps"
    scale, prefix = si_prefix(longest)
    return scale, {"flops": f"{prefix}FLOPs", "tokens": f"generated tokens ({prefix})"}[measure]


@in_style
def cost_split(costs: Mapping[str, Mapping[str, Sequence[float]]], kinds: Mapping[str, Sequence[str]]) -> str | None:
    """By strategy: a panel for every kind of cost, its phases one after the other. `costs`: kind, strategy, phases."""
    names = list(next(iter(costs.values()), {}))
    if not names:
        return None
    figure = new_figure(0.95 + 0.33 * len(names))
    panels = figure.subplots(1, len(costs), squeeze=False, sharey=True)[0]
    for axes, (kind, by_name) in zip(panels, costs.items(), strict=True):
        values = np.array([by_name[name] for name in names])
        scale, unit = axis_unit(kind, float(values.sum(axis=1).max()))
        ends = np.zeros(len(names))
        for place, phase in enumerate(kinds[kind]):
            part = values[:, place] / scale
            axes.barh(range(len(names)), part, left=ends, height=0.64, color=PHASES[phase], label=phase, alpha=0.85)
            ends += part
        for place, name in enumerate(names):
            *rest, train = by_name[name]
            text = f"rest {share(sum(rest) / train)} of training" if train and any(rest) else ""
            axes.annotate(
                text, (ends[place], place), (5, 0), textcoords="offset points", va="center", fontsize=8, color=MUTED
            )
        axes.set(xlabel=unit, ylim=(len(names) - 0.5, -0.5), xlim=(0, max(float(ends.max()), 1e-9) * 1.5))
        grid(axes, "x")
    panels[0].set_yticks(range(len(names)), [shortened(name, LABEL) for name in names])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(PHASES))
    return svg(figure, "comparison-cost")


@in_style
def selection_shares(
    sources: Sequence[str], pool: Sequence[float], by_strategy: Mapping[str, np.ndarray], name: str
) -> str | None:
    """Share of every source by stage, strategies beside each other, after the pool. Columns of an array: stages."""
    if not by_strategy:
        return None
    stages = [values.shape[1] for values in by_strategy.values()]
    slanted = len(stages) > UPRIGHT
    figure = new_figure((1.25 if slanted else 0.8) + 0.17 * len(sources))
    panels = figure.subplots(1, 1 + len(stages), squeeze=False, sharey=True, width_ratios=[1.6, *stages])[0]
    peak = max(max(pool), *(float(values.max()) for values in by_strategy.values()))
    _cells(panels[0], np.array(pool)[:, None], peak)
    turned: dict[str, Any] = {"rotation": 25, "ha": "left"} if slanted else {}
    panels[0].set_title("pool", fontsize=8.5, **turned)
    for axes, (strategy, values) in zip(panels[1:], by_strategy.items(), strict=True):
        _cells(axes, values, peak)
        axes.set_title(shortened(strategy, LABEL), fontsize=8.5, **turned)
        ticks = thinned(range(values.shape[1]), 3)
        axes.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks], fontsize=7.5)
    panels[0].set_yticks([row + 0.5 for row in range(len(sources))], [shortened(s) for s in sources], fontsize=8)
    figure.supxlabel("stage", fontsize=9)
    return svg(figure, f"selected-{name}")


def _cells(axes: Axes, values: np.ndarray, peak: float) -> None:
    rows, columns = values.shape
    for row in range(rows):
        for column in range(columns):
            shade = float(values[row, column]) / peak
            axes.add_patch(Rectangle((column, row), 0.96, 0.94, color=BLUE, alpha=0.85 * shade, linewidth=0))
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


@in_style
def similarities(panels: Sequence[Mapping[str, Any]], looks: Styles, main: str | None) -> str | None:
    """Similarity of the selected prompts by stage; a panel has `title`, `pool` and `strategies` (seeds, stages)."""
    if not panels:
        return None
    figure, all_axes = panel_grid(len(panels), 2.0)
    for axes, panel in zip(all_axes, panels, strict=True):
        axes.axhline(panel["pool"], color=MUTED, linewidth=1.2, linestyle=(0, (2, 2)))
        for name in sorted(panel["strategies"], key=lambda name: name == main):
            values_ST, look = panel["strategies"][name], looks[name]
            at, width = range(values_ST.shape[1]), 2.2 if name == main else 1.3
            axes.fill_between(
                at, values_ST.min(axis=0), values_ST.max(axis=0), color=look["color"], alpha=0.1, linewidth=0
            )
            axes.plot(at, values_ST.mean(axis=0), linewidth=width, **look)
        axes.set_title(panel["title"])
        axes.set_xticks(thinned(range(max(v.shape[1] for v in panel["strategies"].values())), 6))
        grid(axes, "y")
    figure.supxlabel("stage (dotted: the whole pool)", fontsize=9)
    legend(figure, looks, [name for name in looks if any(name in panel["strategies"] for panel in panels)])
    return svg(figure, "similarity")
