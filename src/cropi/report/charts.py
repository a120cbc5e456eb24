"""Line charts: static as an SVG element, and as the data that the page's script draws them from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes

from cropi.report.blocks import Chart, Line, Picture
from cropi.report.drawing import BLUE, INK, MUTED, grid, in_style, panel_grid, shortened, svg

LABEL = 24  # letters of a name in a figure
MARKS = 6  # of a curve, so that they do not cover it
PAGE_NAMES = {INK: "--ink", MUTED: "--muted"}  # the page's own colours, by the stand-in they are drawn in
DASHES: dict[Any, list[int]] = {"-": [], "--": [7, 3], "-.": [7, 3, 2, 3], ":": [2, 3]}  # as the script takes them


def chart_picture(charts: Sequence[Chart], name: str, caption: str) -> Picture:
    """Draw charts beside each other; `name` keeps the ids of the SVG apart."""
    return Picture(_svg(charts, name), caption, charts)


@in_style
def _svg(charts: Sequence[Chart], name: str) -> str:
    figure, panels = panel_grid(len(charts), 2.5)
    for axes, chart in zip(panels, charts, strict=True):
        for line in chart.lines:
            _draw(axes, line)
        for value in chart.rules:
            axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
        axes.set(xlabel=chart.x_label, ylim=chart.limits)
        axes.set_title(shortened(chart.title, 48))
        axes.set_xlim(left=0)
        grid(axes, "y")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=min(4, len(handles)))
    return svg(figure, name)


def _draw(axes: Axes, line: Line) -> None:
    look = {"color": BLUE, "marker": "o"} | dict(line.look)
    if line.low:
        axes.fill_between(line.x, line.low, line.high, color=look["color"], alpha=0.12, linewidth=0)
    every = max(1, len(line.x) // MARKS)
    axes.plot(line.x, line.y, label=shortened(line.name, LABEL), markevery=every, **look)


def chart_data(charts: Iterable[Chart]) -> str:
    """The charts as JSON, as the page's script reads them."""
    return json.dumps([_plain(chart) for chart in charts], ensure_ascii=False, separators=(",", ":"))


def _plain(chart: Chart) -> dict[str, Any]:
    return {
        "title": shortened(chart.title, 48),
        "x": chart.x_label,
        "rules": _rounded(chart.rules),
        "limits": chart.limits,
        "lines": [
            {
                "name": shortened(line.name, LABEL),
                "color": PAGE_NAMES.get(line.look.get("color", BLUE), line.look.get("color", BLUE)),
                "width": line.look.get("linewidth", 1.8),
                "dash": _dash(line.look.get("linestyle", "-")),
                **{part: _rounded(getattr(line, part)) for part in ("x", "y", "low", "high")},
            }
            for line in chart.lines
        ],
    }


def _dash(linestyle: Any) -> list[int]:
    return DASHES[linestyle] if isinstance(linestyle, str) else [2 * part for part in linestyle[1]]


def _rounded(values: Iterable[float]) -> list[float | None]:
    """Four digits each; what is not finite is a gap."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values]
