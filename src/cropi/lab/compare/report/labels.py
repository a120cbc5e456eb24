"""Numbers and names of a comparison as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cropi.functional.bootstrap import Interval
from cropi.lab.compare.report.runs_data import SUITE, interval
from cropi.report.wording import ABSENT, decimal, on_one_line

BOUND = "< "
ALL = "all scenarios"
UNITS = {"steps": "steps", "tokens": "generated tokens", "flops": "FLOPs", "seconds": "seconds"}
NAME_LENGTH = 60


def code(name: str) -> str:
    """A name from the data inside prose: between backticks, and with none inside."""
    return f"`{on_one_line(name, NAME_LENGTH).replace('`', chr(39))}`"


def scenario_label(scenario: str) -> str:
    """A scenario in a cell."""
    return ALL if scenario == SUITE else scenario


def ratio(value: float) -> str:
    """`2.31`, `0.046`, `12.4`: three digits that mean something, two for large ones."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio_interval(found: Interval | None) -> str:
    """`2.31 [1.80, 3.02]`."""
    if found is None:
        return ABSENT
    return f"{ratio(found.mean)} [{ratio(found.low)}, {ratio(found.high)}]"


def reached(entry: Mapping[str, Any]) -> float | None:
    """Share of the runs that came to the target."""
    value = entry["to"].get("target", {}).get("reached")
    return None if value is None else float(value)


def no_gain(entry: Mapping[str, Any]) -> float:
    """Share of the runs in which the target is where training begins."""
    return float(entry["to"].get("target", {}).get("no_gain", 0.0))


def censored(entry: Mapping[str, Any]) -> bool:
    """Whether some run never came to the target, so that ratios are upper bounds."""
    share = reached(entry)
    return share is not None and share < 1


def speedup(entry: Mapping[str, Any], measure: str) -> str:
    """`2.31 [1.80, 3.02]`, marked where it is an upper bound."""
    found = interval(entry["speedup"].get(measure))
    return f"{BOUND if found and censored(entry) else ''}{ratio_interval(found)}"


def accuracy(found: Interval | None) -> str:
    """`0.812 [0.790, 0.833]`."""
    if found is None:
        return ABSENT
    return f"{decimal(found.mean, 3)} [{decimal(found.low, 3)}, {decimal(found.high, 3)}]"


def gap(found: Interval | None) -> str:
    """`+0.031 [0.010, 0.052]`."""
    if found is None:
        return ABSENT
    return f"{plus(found.mean)} [{decimal(found.low, 3)}, {decimal(found.high, 3)}]"


def plus(value: float) -> str:
    """`+0.031`, `−0.004`, `0.000`."""
    text = decimal(value, 3)
    return text if text.startswith("−") or not float(text) else f"+{text}"


def large(value: float | None) -> str:
    """`12.3 T`: a count with a prefix."""
    if value is None:
        return ABSENT
    scale, prefix = scaled(value)
    return f"{value / scale:.3g} {prefix}".rstrip()


def scaled(value: float) -> tuple[float, str]:
    """Divisor and SI prefix for numbers as large as this one."""
    for scale, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return scale, prefix
    return 1.0, ""


def clock(longest: float) -> tuple[float, str]:
    """Divisor and unit for times up to this many seconds."""
    return (3600.0, "hours") if longest >= 7200 else (60.0, "minutes") if longest >= 300 else (1.0, "seconds")


def part(share: float | None) -> str:
    """`6 %` of the runs: nearly none and nearly all are not rounded to them."""
    if share is None:
        return ABSENT
    if 0 < share < 0.01 or 0.99 < share < 1:
        return "< 1 %" if share < 0.5 else "> 99 %"
    return f"{100 * share:.0f} %"
