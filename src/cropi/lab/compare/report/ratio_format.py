"""Speed-ups and shares of runs as the report of a comparison shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cropi.functional.intervals import Interval
from cropi.lab.compare.paired_runs import SUITE, interval
from cropi.report.wording import ABSENT

UNITS = {"steps": "steps", "tokens": "generated tokens", "flops": "FLOPs", "seconds": "seconds"}
HEADLINE_MEASURES = ("steps", "flops", "seconds")
Entry = Mapping[str, Any]


def scenario_label(scenario: str) -> str:
    """A scenario in a cell."""
    return "all scenarios" if scenario == SUITE else scenario


def ratio(value: float) -> str:
    """`2.31`, `0.046`, `12.4`: three digits, two for large ones."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio_interval(found: Interval | None) -> str:
    """`2.31 [1.80, 3.02]`."""
    if found is None:
        return ABSENT
    return f"{ratio(found.mean)} [{ratio(found.low)}, {ratio(found.high)}]"


def speedup(entry: Entry, measure: str) -> str:
    """`2.31 [1.80, 3.02]`, with `<` if it is an upper bound."""
    found = interval(entry["speedup"].get(measure))
    return f"{'< ' if found and censored(entry) else ''}{ratio_interval(found)}"


def reached(entry: Entry) -> float | None:
    """Share of the runs that reached the target."""
    value = entry["to"].get("target", {}).get("reached")
    return None if value is None else float(value)


def no_gain(entry: Entry) -> float:
    """Share of the runs whose target is no higher than the base policy."""
    return float(entry["to"].get("target", {}).get("no_gain", 0.0))


def censored(entry: Entry) -> bool:
    """Whether some run never reached the target, so that ratios are upper bounds."""
    share = reached(entry)
    return share is not None and share < 1
