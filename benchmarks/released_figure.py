"""Figure and tables of benchmarks/released_projection.py, beside the published values."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import released_faults as faults
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cropi.report.figures import BLUE, GREEN, GREY, ORANGE, PINK, SETTINGS, SKY, grid

# "Rank precision" in percent by kept share: read off the figures of the publication (arXiv 2510.26491), +-1.
PUBLISHED: dict[str, dict[float, float]] = {
    "1.5B": {1.0: 13.4, 0.9: 16, 0.5: 22.6, 0.3: 39.5, 0.2: 67.7, 0.15: 76.6, 0.12: 72.6, 0.1: 69.7, 0.09: 68.7,
             0.08: 66.4, 0.05: 67, 0.03: 62.9, 0.01: 51.5, 1e-3: 34, 1e-4: 17.6, 1e-5: 15.7},
    "3B": {1.0: 14.5, 0.9: 14.1, 0.5: 17.2, 0.3: 40, 0.2: 67.1, 0.15: 82, 0.12: 80.5, 0.1: 78.9, 0.09: 78.4,
           0.08: 77.7, 0.05: 73.5, 0.03: 68.8, 0.01: 60, 1e-3: 41.5, 1e-4: 39.7, 1e-5: 35.6},
}  # fmt: skip

CORRECT = {
    "ours_structured": ("ours: structured mask, count-sketch", {"color": BLUE, "marker": "o"}),
    "ours_uniform": ("ours: uniform mask, count-sketch", {"color": SKY, "marker": "s", "linestyle": "--"}),
    "dense": ("uniform mask, dense Gaussian projection", {"color": GREEN, "marker": "D", "linestyle": "-."}),
}
FAULTY = {
    "wrapped": ("fault 2: row offsets wrap", {"color": ORANGE, "marker": "o"}),
    "first": ("fault 1: the first coordinates", {"color": PINK, "marker": "v", "linestyle": "--"}),
    "first_aligned": ("fault 1, embedding as large as theirs", {"color": GREY, "marker": "^", "linestyle": ":"}),
    "both": ("both faults", {"color": "#222222", "marker": "s", "linestyle": "-."}),
}
LARGEST = 32768


def values_of(result: dict[str, Any], arm: str, keep: float, dim: int | None, metric: str) -> list[Any]:
    """One value per seed."""
    return next(row[metric] for row in result["rows"] if (row["arm"], row["keep"], row["dim"]) == (arm, keep, dim))


def kept_shares(result: dict[str, Any]) -> list[float]:
    return sorted({row["keep"] for row in result["rows"]}, reverse=True)


def chance_mixture(correct: float, keep: float, chance: float = 0.1) -> float:
    """Precision where a query, or a candidate, that was read wrongly is as good as chance, q being the intact share:
    q (p q + c (1 - q)) + c (1 - q)."""
    intact = _intact(keep) / faults.RELEASED_BATCH
    return intact * (correct * intact + chance * (1 - intact)) + chance * (1 - intact)


def draw(result: dict[str, Any]) -> str:
    """SVG: correct projections on the left, faulty ones on the right, the published points in both."""
    colours = {"axes.edgecolor": "#777", "xtick.color": "#555", "ytick.color": "#555", "grid.color": "#e4e4e4"}
    settings = SETTINGS | colours | {"figure.facecolor": "white", "text.color": "#222", "axes.labelcolor": "#222"}
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(settings)
        figure = Figure(figsize=(9.6, 5.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, result, CORRECT, f"Correct projections, D = {LARGEST:,}")
        _panel(right, result, FAULTY, f"With the faults of the released code, D = {LARGEST:,}")
        left.set_ylabel("neighbours kept among the nearest tenth, %")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _panel(axes: Axes, result: dict[str, Any], arms: dict[str, tuple[str, dict[str, Any]]], title: str) -> None:
    shares = kept_shares(result)
    for size, colour in (("1.5B", "#333333"), ("3B", "#999999")):
        points = PUBLISHED[size]
        axes.plot(
            list(points),
            list(points.values()),
            "x",
            color=colour,
            label=f"published, {size} (read off its figure)",
            ms=5,
        )
    for arm, (label, style) in arms.items():
        found = [[100 * v for v in values_of(result, arm, keep, LARGEST, "neighbours_cosine")] for keep in shares]
        axes.plot(shares, [statistics.mean(values) for values in found], label=label, **style)
        lows, highs = [min(values) for values in found], [max(values) for values in found]
        axes.fill_between(shares, lows, highs, color=style["color"], alpha=0.2)
    axes.axhline(10, color="#999", linewidth=0.8, linestyle=":")
    axes.text(1.2e-5, 11, "chance", color="#777", fontsize=8)
    axes.set(xscale="log", ylim=(0, 102), xlabel="share of the coordinates that is kept", title=title)
    grid(axes, "y")
    axes.legend(loc="upper left", fontsize=8, bbox_to_anchor=(0.0, -0.14))


def print_tables(result: dict[str, Any]) -> None:
    """Markdown: neighbours beside the published values, influence on validation sets, dimensions."""
    arms = ["wrapped", "both", "first", "first_aligned", "dense", "ours_uniform", "ours_structured"]
    shares = kept_shares(result)
    head = ["kept", "rows intact of 16", *(f"published {size}" for size in PUBLISHED), *arms]
    _table("neighbours by cosine, %", head, [_beside_published(result, keep, arms) for keep in shares])
    rows = [[arm, *(f"{_distance(result, arm, curve):.1f}" for curve in PUBLISHED.values())] for arm in arms]
    _table("mean distance from the published points, in points", ["arm", *PUBLISHED], rows)
    _table(
        "wrong rows as good as chance, %",
        ["kept", "from the published 0.15", "from `dense`"],
        [[f"{keep:g}", *_mixtures(result, keep)] for keep in shares if _intact(keep) < faults.RELEASED_BATCH],
    )
    for metric, write in (
        ("neighbours_dot", percent),
        ("validation_precision", percent),
        ("validation_spearman", lambda value: f"{value:.3f}"),
    ):
        rows = [
            [f"{keep:g}", *(_interval(values_of(result, arm, keep, LARGEST, metric), write) for arm in arms)]
            for keep in shares
        ]
        _table(metric, ["kept", *arms], rows)
    for metric in ("neighbours_cosine", "validation_precision"):
        head = ["arm", "kept", *(str(dim or "no projection") for dim in _dims(result))]
        pairs = [(arm, keep) for arm in (*CORRECT, "wrapped") for keep in (1.0, 0.3, 0.1, 0.01)]
        _table(f"{metric} by dimension", head, [_by_dimension(result, arm, keep, metric) for arm, keep in pairs])
    rows = [
        [
            f"{keep:g}",
            *(percent(values_of(result, arm, keep, None, "zero_share")[0]) for arm in ("first", "first_aligned")),
        ]
        for keep in shares
    ]
    _table("prompts of which nothing is kept, %", ["kept", "first", "first_aligned"], rows)
    rows = [
        [row["arm"], f"{row['keep']:g}", str(row["dim"]), _interval(row[metric], percent),
         _interval(values_of(result, row["arm"], row["keep"], row["dim"], metric), percent)]
        for row in result["real_products"] for metric in ("neighbours_cosine",)
    ]  # fmt: skip
    _table("neighbours by cosine, %: real products", ["arm", "kept", "D", "real product", "from its law"], rows)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _intact(keep: float) -> int:
    return faults.intact_rows(faults.RELEASED_BATCH, round(keep * faults.RELEASED_FEATURES), faults.WORD)


def _beside_published(result: dict[str, Any], keep: float, arms: list[str]) -> list[str]:
    found = (_interval(values_of(result, arm, keep, LARGEST, "neighbours_cosine"), percent) for arm in arms)
    return [f"{keep:g}", str(_intact(keep)), *(f"{curve[keep]:g}" for curve in PUBLISHED.values()), *found]


def _mixtures(result: dict[str, Any], keep: float) -> list[str]:
    ours = statistics.mean(values_of(result, "dense", keep, LARGEST, "neighbours_cosine"))
    return [percent(chance_mixture(correct, keep)) for correct in (PUBLISHED["1.5B"][0.15] / 100, ours)]


def _distance(result: dict[str, Any], arm: str, curve: dict[float, float]) -> float:
    """Mean |ours - published| over the kept shares that both have."""
    found = {keep: values_of(result, arm, keep, LARGEST, "neighbours_cosine") for keep in kept_shares(result)}
    return statistics.mean(abs(100 * statistics.mean(values) - curve[keep]) for keep, values in found.items())


def _dims(result: dict[str, Any]) -> list[int | None]:
    return [*sorted({row["dim"] for row in result["rows"] if row["dim"]}), None]


def _by_dimension(result: dict[str, Any], arm: str, keep: float, metric: str) -> list[str]:
    dims = [dim for dim in _dims(result) if dim or not arm.startswith("ours")]
    found = [_interval(values_of(result, arm, keep, dim, metric), percent) for dim in dims]
    return [arm, f"{keep:g}", *found, *["–"] * (len(_dims(result)) - len(dims))]


def _interval(values: list[float | None], write: Callable[[float], str]) -> str:
    """The mean over seeds, and smallest and largest; a dash where the metric is not defined for one of them."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    low, high, mean = write(min(known)), write(max(known)), write(statistics.mean(known))
    return mean if low == high else f"{mean} ({low}–{high})"


def _table(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
