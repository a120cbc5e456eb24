"""The figures of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from cropi.lab.compare.paired_runs import Comparison, interval
from cropi.lab.compare.report.accuracy_bands import Band
from cropi.lab.number_format import UNITS, censored
from cropi.report.blocks import Chart, Line, Picture
from cropi.report.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LABEL,
    MUTED,
    ORANGE,
    PINK,
    SKY,
    STRATEGY_STYLES,
    axis_unit,
    chart_picture,
    grid,
    in_style,
    new_figure,
    shortened,
    svg,
)

AMBER = "#e69f00"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER, GREY, INK)
MARKS = ("o", "s", "D", "v", "P", "X", "^", "*")
DASHES = ("-", (0, (5, 1)), "-.", (0, (1, 1)))
RATIOS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
FINE_RATIOS = (0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 2.8, 4)

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


def accuracy_curves(
    found: Mapping[str, Mapping[str, Band]], measure: str, looks: Styles, main: str | None, target: str, caption: str
) -> Picture:
    """Targeted accuracy with bands, a chart for every scenario. Dotted: where `target` ends."""
    longest = max(float(band.at[-1]) for bands in found.values() for band in bands.values())
    scale, unit = axis_unit(measure, longest)
    charts = []
    for scenario, bands in found.items():
        lines = []
        for name in sorted(bands, key=lambda name: name == main):  # the main one on top
            band, look = bands[name], {**looks[name], "linewidth": 2.4 if name == main else 1.3}
            mean, low, high = (part.tolist() for part in (band.mean, band.low, band.high))
            lines.append(Line(name, (band.at / scale).tolist(), mean, low, high, look))
        rules = [float(bands[target].mean[-1])] if target in bands else []
        charts.append(Chart(scenario, unit, lines, rules))
    return chart_picture(charts, f"curves-{measure}", caption)
