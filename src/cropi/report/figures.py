"""The figures of a run's report; None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cropi.report.blocks import Chart, Line, Picture
from cropi.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    LABEL,
    MUTED,
    ORANGE,
    PINK,
    SKY,
    chart_picture,
    grid,
    in_style,
    new_figure,
    shortened,
    svg,
)
from cropi.report.summary import Summary
from cropi.report.wording import share, si_prefix

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
