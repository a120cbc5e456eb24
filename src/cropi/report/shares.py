"""Selections: shares by source, and overlap between stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import compress

from cropi.report.blocks import Table
from cropi.report.reading import Selection
from cropi.report.wording import count

MAX_SOURCES = 20  # rows of a table by source

Columns = dict[str, Counter[str]]  # counts by source: of the pool, and of what was taken from it


def selected_sources(stages: Mapping[int, Selection]) -> Columns:
    """Prompts by source, in the pool and in every stage's selection. There is at least one stage."""
    pool = Counter(next(iter(stages.values())).sources)
    return {"pool": pool} | {f"stage {n}": Counter(compress(one.sources, one.selected)) for n, one in stages.items()}


def gathered(columns: Columns) -> Columns:
    """The sources with the largest shares anywhere, largest in the pool first, then all others together."""
    pool = columns["pool"]
    names = sorted(pool, key=lambda source: (-pool[source], source))
    if len(names) <= MAX_SOURCES:
        return {title: Counter({name: own[name] for name in names}) for title, own in columns.items()}
    peak = {name: max(own[name] / max(own.total(), 1) for own in columns.values()) for name in names}
    kept = {*sorted(names, key=lambda source: (-peak[source], source))[: MAX_SOURCES - 1]}
    rest = f"{len(names) - len(kept)} other sources"
    shown = [name for name in names if name in kept]
    return {
        title: Counter({name: own[name] for name in shown} | {rest: own.total() - sum(own[name] for name in shown)})
        for title, own in columns.items()
    }


def share_table(columns: Columns, caption: str, first: str = "source") -> Table:
    """Counts and shares as a table, darker where the share is larger."""
    columns = gathered(columns)
    shares = {title: {name: own[name] / max(own.total(), 1) for name in own} for title, own in columns.items()}
    sources = list(columns["pool"])
    rows = [[name, *(_counted(own[name], shares[title][name]) for title, own in columns.items())] for name in sources]
    peak = max(part for own in shares.values() for part in own.values()) or 1.0
    shades = [[None, *(own[name] / peak for own in shares.values())] for name in sources]
    rows.append(["all", *(count(own.total()) for own in columns.values())])
    return Table(caption, [first, *columns], rows, strong=len(rows) - 1, shades=shades)


def _counted(number: int, part: float) -> str:
    return f"{number:,} ({100 * part:.0f} %)" if number else "0"


def jaccard(stages: Mapping[int, Selection]) -> dict[int, float]:
    """|A ∩ B| / |A ∪ B| of each stage's selection with that of the stage before, by the later stage."""
    overlaps = {}
    for stage in sorted(stages):
        if stage - 1 in stages:
            before, now = stages[stage - 1].chosen, stages[stage].chosen
            overlaps[stage] = len(before & now) / len(before | now) if before | now else 1.0
    return overlaps


def random_jaccard(fraction: float) -> float:
    """The overlap to expect of two independent random draws of the same share α of a large pool: α / (2 − α)."""
    return fraction / (2 - fraction)
