"""The parts of a report, before they become HTML or Markdown.

Prose (`Text` and captions) is written by this package: what stands between backticks in it is shown as code. Everything
from data, model output or config goes into cells, facts and code, which both renderings escape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Text:
    """A paragraph of prose."""

    kind: ClassVar[str] = "text"
    text: str
    lead: bool = False  # the paragraph that a hurried reader reads


@dataclass(frozen=True)
class Numbers:
    """The few numbers that a page begins with, shown large: each with a label and what it is measured by."""

    kind: ClassVar[str] = "numbers"
    numbers: Sequence[tuple[str, str, str]]  # label, value, detail


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first `left` columns hold words, the others numbers."""

    kind: ClassVar[str] = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    strong: int | None = None  # the row to stress
    collapsed: bool = False
    shades: Sequence[Sequence[float | None]] = ()  # by row and column, 0 to 1: how dark a cell is


@dataclass(frozen=True)
class Line:
    """A curve of a chart, with a band where `low` and `high` are given."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    look: Mapping[str, Any] = field(default_factory=dict)  # Matplotlib's color, marker, linestyle and linewidth

    @property
    def described(self) -> str:
        """The curve in words."""
        return f"{self.name} from {self.y[0]:.3g} at {self.x[0]:.3g} to {self.y[-1]:.3g} at {self.x[-1]:.3g}"


@dataclass(frozen=True)
class Chart:
    """Curves over one axis."""

    title: str
    x_label: str
    lines: Sequence[Line]
    rules: Sequence[float] = ()  # values that are marked by a dotted line across
    limits: tuple[float, float] | None = None  # of the vertical axis


@dataclass(frozen=True)
class Picture:
    """A drawn SVG element, and the charts that scripts draw in its place. Markdown leaves it out."""

    kind: ClassVar[str] = "picture"
    svg: str
    caption: str
    charts: Sequence[Chart] = ()

    @property
    def alt(self) -> str:
        """The picture in words: where each curve begins and ends, or else the caption."""
        curves = [f"{chart.title}: {line.described}" for chart in self.charts for line in chart.lines]
        return "; ".join(curves) or self.caption.replace("`", "")


@dataclass(frozen=True)
class Code:
    """Text as it is, in a fixed-width face."""

    kind: ClassVar[str] = "code"
    title: str
    text: str
    collapsed: bool = False


@dataclass(frozen=True)
class Card:
    """One thing looked at closely: short facts, then longer texts, each with a label, and a table."""

    kind: ClassVar[str] = "card"
    title: str
    facts: Sequence[tuple[str, str]]
    texts: Sequence[tuple[str, str]]
    table: Table | None = None


Block = Text | Numbers | Table | Picture | Code | Card


@dataclass(frozen=True)
class Section:
    """A numbered part of the report."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


def table_row(cells: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def text_table(table: Table) -> str:
    """Render a table for a terminal: Markdown whose columns are as wide as their widest cell, without the caption."""
    rows = [list(table.header), *map(list, table.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.header))]

    def line(row: Sequence[str]) -> str:
        pairs = enumerate(zip(row, widths, strict=True))
        return table_row([cell.ljust(width) if n < table.left else cell.rjust(width) for n, (cell, width) in pairs])

    marks = ["-" * width if n < table.left else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    return "\n".join([line(rows[0]), table_row(marks), *map(line, rows[1:])])
