"""Numbers and names as the reports of comparisons and audits show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cropi.functional.intervals import Interval
from cropi.lab.compare.paired_runs import SUITE, interval
from cropi.report.wording import ABSENT, bounds, decimal, on_one_line, si_prefix

UNITS = {"steps": "steps", "tokens": "generated tokens", "flops": "FLOPs", "seconds": "seconds"}
NAME_LENGTH = 60  # characters of a name in prose
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
    return ABSENT if found is None else f"{ratio(found.mean)} {bounds(found, ratio)}"


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


def signed(value: float, digits: int = 2) -> str:
    """`+0.22`, `−0.03`, `0.00`."""
    text = decimal(value, digits)
    return text if text.startswith("−") or not float(text) else f"+{text}"


def difference(interval: Interval | None, digits: int = 2) -> str:
    """`+0.22 [+0.15, +0.29]`."""
    return ABSENT if interval is None else f"{signed(interval.mean, digits)} {bounds(interval, signed, digits)}"


def large(value: float | None) -> str:
    """`12.3 T`: a count with an SI prefix."""
    if value is None:
        return ABSENT
    scale, prefix = si_prefix(value)
    return f"{value / scale:.3g} {prefix}".rstrip()


def code(name: str) -> str:
    """Show a name from the data inside prose: between backticks, and with none inside."""
    return f"`{on_one_line(name, NAME_LENGTH).replace('`', chr(39))}`"


def listed(parts: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
