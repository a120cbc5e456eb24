"""Numbers and names as reports show them."""

from __future__ import annotations

import math
from collections.abc import Callable

from cropi.console import duration
from cropi.functional.intervals import Interval

ABSENT = "–"
NOT_MEASURED = "not measured"


def decimal(value: float | None, digits: int = 2) -> str:
    """`0.93`; a value that rounds to zero has no sign."""
    if value is None:
        return ABSENT
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def with_interval(interval: Interval | None, digits: int = 2) -> str:
    """`0.93 [0.89, 0.96]`."""
    return ABSENT if interval is None else f"{decimal(interval.mean, digits)} {bounds(interval, decimal, digits)}"


def bounds(interval: Interval, form: Callable[..., str], *options: int) -> str:
    """`[0.89, 0.96]`, and `[–]` where they are not known."""
    shown = [form(value, *options) for value in (interval.low, interval.high) if not math.isnan(value)]
    return f"[{', '.join(shown) or ABSENT}]"


def count(value: float | None) -> str:
    """`1,200`."""
    return ABSENT if value is None else f"{value:,.0f}"


def si_prefix(value: float) -> tuple[float, str]:
    """Divisor and SI prefix for numbers as large as this one."""
    for scale, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return scale, prefix
    return 1.0, ""


def seconds(value: float | None) -> str:
    """`4.1 s`, `2:03`, `1:02:03`."""
    return ABSENT if value is None else duration(value)


def tenths(value: float | None) -> str:
    """`1,234.5`, and `0.02` where one decimal would show too little."""
    return ABSENT if value is None else f"{value:,.1f}" if value >= 1 else f"{value:.2f}"


def percent(share: float | None) -> str:
    """`10 %`, `12.5 %`."""
    if share is None:
        return ABSENT
    return f"{100 * share:.3g} %" if abs(share) < 10 else f"{100 * share:,.0f} %"


def share(value: float | None) -> str:
    """`10.0 %`: with one decimal, for columns."""
    return ABSENT if value is None else f"{100 * value:.1f} %"


def significant(value: float | None, digits: int = 3) -> str:
    """`0.0123`, `−1.2e−05`: digits that mean something."""
    return ABSENT if value is None else f"{value:.{digits}g}".replace("-", "−")


def with_error(value: float, error: float | None) -> str:
    """`0.0123 ± 0.0045`: an estimate and its standard error."""
    return f"{significant(value)} ± {NOT_MEASURED if error is None else significant(error, 2)}"


def about(value: float) -> str:
    """`45`, `3.2`: a count that is an estimate."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def on_one_line(text: str, length: int) -> str:
    """Text from the data for one line: runs of white space as one space, what cannot be printed as U+FFFD, cut."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return clean if len(clean) <= length else clean[: length - 1] + "…"
