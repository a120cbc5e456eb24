"""The figures of reports, drawn by Matplotlib as SVG for a page: no scripts, no references, no dates, light or dark.

Colours that must follow the page are drawn in stand-in colours, which become CSS variables in the SVG.
"""

from __future__ import annotations

import functools
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Text

from cropi.report.blocks import Chart, Line, Picture
from cropi.report.summary import Summary
from cropi.report.wording import on_one_line, share, si_prefix

P = ParamSpec("P")
T = TypeVar("T")

# Drawn in these, shown in the page's own colours.
INK, MUTED, GRID = "#010203", "#020304", "#030405"
PAGE_COLOURS = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--rule)"}

# Okabe and Ito's palette, safe for colour-blind eyes. A mark or a dash tells the lines apart in black and white.
BLUE, ORANGE, GREEN, PINK, SKY, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8c8c8c"
STRATEGY_STYLES: dict[str, dict[str, Any]] = {
    "influence": {"color": BLUE, "marker": "o", "linestyle": "-"},
    "full": {"color": ORANGE, "marker": "s", "linestyle": "--"},
    "random": {"color": GREY, "marker": "^", "linestyle": ":"},
    "learnability": {"color": GREEN, "marker": "D", "linestyle": "-."},
    "pass_rate": {"color": PINK, "marker": "v", "linestyle": (0, (5, 1))},
}

SETTINGS: Any = {
    "svg.hashsalt": "cropi",
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": ["sans-serif"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.0,
    "legend.frameon": False,
}
COLUMNS = 3  # panels in a row
WIDTH = 9.6  # inches; scaled to the page's text width


def new_figure(height: float) -> Figure:
    """An empty figure as wide as the page."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def panel_grid(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels in rows of three; fewer panels are as wide as the page and taller."""
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure = new_figure(0.7 + height * rows * (1 if columns == COLUMNS else 1.3))
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def grid(axes: Axes, axis: str) -> None:
    """Faint lines behind the data."""
    axes.grid(visible=True, axis=axis)  # type: ignore[arg-type]
    axes.tick_params(length=0)


def shortened(text: str, length: int = 26) -> str:
    """A label from the data: printable, on one line, not too long."""
    return on_one_line(text, length)


def thinned(values: Sequence[int], count: int = 12) -> list[int]:
    """At most `count` of the values, evenly spread, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    places = np.linspace(0, len(values) - 1, count).round().astype(int)
    return [values[place] for place in dict.fromkeys(places.tolist())]


def svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element; `name` keeps its ids apart from those of other figures of the page."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar sign in a name is a dollar sign
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Letters that the measuring font lacks: the page's own fonts draw the text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata)
    return _for_page(buffer.getvalue(), name)


def _for_page(text: str, name: str) -> str:
    """An SVG file's element, without what only a file needs."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    head, rest = text.split(">", maxsplit=1)
    head = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", head)
    rest = re.sub(r'(\sid="|\bxlink:href="#|url\(#)', rf"\g<1>{name}-", rest)
    for drawn, shown in PAGE_COLOURS.items():
        rest = rest.replace(drawn, shown)
    rest = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), rest)  # to 0.01 of a point
    return f"{head}>{rest.strip()}"


def in_style(draw: Callable[P, T]) -> Callable[P, T]:
    """Decorator: draw with this module's settings, whatever the user's matplotlibrc says."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(SETTINGS)
            return draw(*args, **kwargs)

    return styled


# -- charts --------------------------------------------------------------------------------------------------------

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


# -- figures of a run; None where there is nothing to draw ---------------------------------------------------------

MAX_PANELS = 4
KIND_COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, GREY)
KIND_MARKS = ("P", "X", "*", "<", ">", "h")
PHASES = {"collect": SKY, "score": BLUE, "select": GREEN, "train": ORANGE}


def learning_curves(summary: Summary, caption: str) -> Picture | None:
    """Accuracy by optimiser step, with bands: the targeted test sets, and the others."""
    charts = []
    for kind in ("targeted", "untargeted"):
        found = [(point.step, value) for point in summary.curve if (value := getattr(point, kind)) is not None]
        if summary.steps and found:
            steps, values = zip(*found, strict=True)
            mean, low, high = ([getattr(value, part) for value in values] for part in ("mean", "low", "high"))
            line = Line(summary.strategy, steps, mean, low, high)
            charts.append(Chart(f"{kind} test sets: accuracy", "optimiser steps", [line], limits=(0, 1.02)))
    return chart_picture(charts, "curves", caption) if charts else None


def reward_curve(summary: Summary, caption: str) -> Picture | None:
    """Mean reward of training by optimiser step."""
    if len(summary.reward_curve) < 2:
        return None
    steps, rewards = zip(*summary.reward_curve, strict=True)
    line = Line(summary.strategy, steps, rewards)
    return chart_picture([Chart("mean reward of training", "optimiser steps", [line])], "rewards", caption)


def influence_by_kind(
    found: Mapping[str, Mapping[str, Mapping[int, tuple[float, float]]]], kinds: Sequence[str], caption: str
) -> Picture:
    """Mean influence with its error by step: a chart for each validation set, a line for each kind of prompt."""
    charts = []
    for name, by_kind in list(found.items())[:MAX_PANELS]:
        lines = []
        for number, kind in enumerate(kinds):
            by_step = by_kind.get(kind, {})
            means_S, errors_S = np.array(list(by_step.values())).reshape(-1, 2).T
            look = {"color": KIND_COLOURS[number % 6], "marker": KIND_MARKS[number % 6]}
            band = (means_S - errors_S).tolist(), (means_S + errors_S).tolist()
            lines.append(Line(kind, list(by_step), means_S.tolist(), *band, look))
        charts.append(Chart(f"influence on {name}", "optimiser steps", lines, rules=[0]))
    return chart_picture(charts, "beliefs", caption)


def gain_of_choosing(gains: Mapping[int, tuple[float, float, float]], caption: str) -> Picture | None:
    """By step: how many times more a chosen prompt helps than a random one, with its interval."""
    if not gains:
        return None
    middle, low, high = zip(*gains.values(), strict=True)
    limits = min(0.0, 2 * min(middle)), max(2.0, 2 * max(middle))  # wide intervals are cut
    line = Line("gain", list(gains), middle, low, high)
    title = "help of a chosen prompt ÷ help of a random one"
    return chart_picture([Chart(title, "optimiser steps", [line], [1], limits)], "gain", caption)


@in_style
def cost_split(costs: Mapping[str, Mapping[str, Mapping[str, float]]], name: str) -> str | None:
    """Stacked bars: a panel for every kind of cost, a bar for every strategy, a part for every phase."""
    names = list(next(iter(costs.values()), {}))
    if not names:
        return None
    figure = new_figure(0.95 + 0.33 * len(names))
    panels = figure.subplots(1, len(costs), squeeze=False, sharey=True)[0]
    for axes, (kind, by_name) in zip(panels, costs.items(), strict=True):
        totals = [sum(phases.values()) for phases in by_name.values()]
        scale, unit = axis_unit(kind, max(totals))
        ends = np.zeros(len(names))
        for phase in next(iter(by_name.values())):
            part = np.array([phases[phase] for phases in by_name.values()]) / scale
            axes.barh(range(len(names)), part, left=ends, height=0.64, color=PHASES[phase], label=phase, alpha=0.85)
            ends += part
        for place, phases in enumerate(by_name.values()):
            rest = totals[place] - phases["train"]
            text = f"rest {share(rest / phases['train'])} of training" if phases["train"] and rest else ""
            style = {"textcoords": "offset points", "va": "center", "fontsize": 8, "color": MUTED}
            axes.annotate(text, (ends[place], place), (5, 0), **style)
        axes.set(xlabel=unit, ylim=(len(names) - 0.5, -0.5), xlim=(0, max(float(ends.max()), 1e-9) * 1.5))
        grid(axes, "x")
    panels[0].set_yticks(range(len(names)), [shortened(name, LABEL) for name in names])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(PHASES))
    return svg(figure, name)


def axis_unit(measure: str, longest: float) -> tuple[float, str]:
    """Divisor and label of an axis."""
    if measure == "seconds":
        return (3600.0, "hours") if longest >= 7200 else (60.0, "minutes") if longest >= 300 else (1.0, "seconds")
    if measure == "steps":
        return 1.0, "optimiser steps"
    scale, prefix = si_prefix(longest)
    return scale, {"flops": f"{prefix}FLOPs", "tokens": f"generated tokens ({prefix})"}[measure]
