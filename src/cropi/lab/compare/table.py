"""What a comparison shows, as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cropi.lab.compare.statistics import MEASURES, SUITE


def as_text(summary: Mapping[str, Any]) -> str:
    """A table for every scenario and one over all of them, and how to read them."""
    if not summary["entries"]:
        return "no run is finished yet"
    scenarios = [*summary["scenarios"], *([SUITE] if len(summary["scenarios"]) > 1 else [])]
    blocks = [_block(summary, scenario) for scenario in scenarios]
    return "\n\n".join([*blocks, _legend(summary)])


def _block(summary: Mapping[str, Any], scenario: str) -> str:
    entries = [entry for entry in summary["entries"] if entry["scenario"] == scenario]
    if not entries:
        return f"{scenario}: no strategy has a seed in common with the references"
    references = summary["references"]
    header = ["strategy", "seeds", *(f"x {m}" for m in MEASURES), "reached", "area"]
    header += [f"area - {name}" for name in references] + ["final", "untargeted"]
    rows = [header, *(_row(entry, references) for entry in entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([scenario, *lines])


def _row(entry: Mapping[str, Any], references: Sequence[str]) -> list[str]:
    reached = entry["to"].get("target", {}).get("reached")
    bound = "<" if reached is not None and reached < 1 else ""
    return [
        entry["strategy"],
        str(entry["seeds"]),
        *(_interval(entry["speedup"].get(measure), "{:.2f}", bound) for measure in MEASURES),
        "" if reached is None else f"{reached:.0%}",
        _interval(entry["area"].get("steps"), "{:.3f}"),
        *(_interval(entry["against"][name]["area"].get("steps"), "{:+.3f}") for name in references),
        _interval(entry["final"].get("targeted"), "{:.3f}"),
        _interval(entry["final"].get("untargeted"), "{:.3f}"),
    ]


def _interval(value: Mapping[str, float] | None, form: str, bound: str = "") -> str:
    if value is None:
        return ""
    mean, low, high = (form.format(value[key]) for key in ("mean", "low", "high"))
    return f"{bound}{mean} [{low}, {high}]"


def _legend(summary: Mapping[str, Any]) -> str:
    target, step = summary["target"], summary["up_to_step"]
    cut = "" if step is None else f"After {step} steps; runs that have not come to their end are among them.\n"
    return (
        f"{cut}"
        f"x: how many times sooner {target}'s own final targeted accuracy is reached, everything charged "
        "(geometric mean; < an upper bound: some runs never reached it, see `reached`).\n"
        "area: mean targeted accuracy over the steps. final, untargeted: accuracy at the end.\n"
        f"In brackets: {summary['confidence']:.0%} of {summary['redraws']} paired redraws of seeds and questions."
    )
