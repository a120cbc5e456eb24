"""The parts of a report, before they become HTML or Markdown.

Prose (`Text` and captions) is written by this package: what stands between backticks in it is shown as code. Everything
from data, model output or config goes into cells, facts and code, which both renderings escape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Text:
    """A paragraph of prose."""

    kind: ClassVar[str] = "text"
    text: str
    lead: bool = False  # the paragraph that a hurried reader reads


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


@dataclass(frozen=True)
class Picture:
    """A drawn SVG element. Markdown leaves it out."""

    kind: ClassVar[str] = "picture"
    svg: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Text as it is, in a fixed-width face."""

    kind: ClassVar[str] = "code"
    title: str
    text: str
    collapsed: bool = False


@dataclass(frozen=True)
class Card:
    """One thing looked at closely: short facts, then longer texts, each with a label."""

    kind: ClassVar[str] = "card"
    title: str
    facts: Sequence[tuple[str, str]]
    texts: Sequence[tuple[str, str]]


Block = Text | Table | Picture | Code | Card


@dataclass(frozen=True)
class Section:
    """A numbered part of the report."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
