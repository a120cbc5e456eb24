"""Selections: shares by source, and overlap between stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cropi.report.blocks import Table
from cropi.report.reading import Selection
from cropi.report.wording import count

MAX_SOURCES = 20  # rows of a table or figure by source


@dataclass(frozen=True)
class Shares:
    """Counts by source: in the pool and in every stage's selection."""

    sources: Sequence[str]
    pool_counts: Sequence[int]
    stage_counts: Mapping[int, Sequence[int]]

    @property
    def pool(self) -> list[float]:
        """Shares of the pool."""
        return _normalised(self.pool_counts)

    @property
    def by_stage(self) -> dict[int, list[float]]:
        """Shares of each stage's selection."""
        return {stage: _normalised(counts) for stage, counts in self.stage_counts.items()}


def source_shares(stages: Mapping[int, Selection]) -> Shares:
    """Shares by source, the largest first; the small ones of a long list together. There is at least one stage."""
    pool = Counter(next(iter(stages.values())).sources)
    return shares_of(pool, {stage: _chosen_sources(selection) for stage, selection in stages.items()})


def shares_of(pool: Counter[str], by_stage: Mapping[int, Counter[str]]) -> Shares:
    """Shares from counts by source, in the pool and by stage."""
    names = _shown(pool, list(by_stage.values()))
    rest = len(names) < len(pool)
    counts = {stage: _column(names, column, rest) for stage, column in by_stage.items()}
    return Shares(_labels(names, pool), _column(names, pool, rest), counts)


def _shown(pool: Counter[str], selections: Sequence[Counter[str]]) -> list[str]:
    """Sources with a row of their own, largest in the pool first: those with the largest shares anywhere."""
    names = sorted(pool, key=lambda source: (-pool[source], source))
    if len(names) <= MAX_SOURCES:
        return names
    columns = [column for column in (pool, *selections) if column]
    peak = {name: max(column[name] / column.total() for column in columns) for name in names}
    kept = {*sorted(names, key=lambda source: (-peak[source], source))[: MAX_SOURCES - 1]}
    return [name for name in names if name in kept]


def _chosen_sources(selection: Selection) -> Counter[str]:
    return Counter(source for source, taken in zip(selection.sources, selection.selected, strict=True) if taken)


def _labels(names: Sequence[str], pool: Mapping[str, int]) -> list[str]:
    rest = len(pool) - len(names)
    return [*names, *([f"{rest} other sources"] if rest else [])]


def _column(names: Sequence[str], counts: Counter[str], with_rest: bool) -> list[int]:
    """Counts of the named sources, then of all others together."""
    column = [counts[name] for name in names]
    return [*column, counts.total() - sum(column)] if with_rest else column


def _normalised(counts: Sequence[int]) -> list[float]:
    total = max(sum(counts), 1)
    return [count / total for count in counts]


def share_table(shares: Shares, caption: str) -> Table:
    """Counts and shares as a table."""
    stages = zip(shares.stage_counts.values(), shares.by_stage.values(), strict=True)
    columns = [(shares.pool_counts, shares.pool), *stages]
    rows = [
        [source, *(_counted(counts[row], part[row]) for counts, part in columns)]
        for row, source in enumerate(shares.sources)
    ]
    rows.append(["all", *(count(sum(counts)) for counts, _ in columns)])
    header = ["source", "pool", *(f"stage {stage}" for stage in shares.stage_counts)]
    return Table(caption, header, rows, strong=len(rows) - 1)


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
