"""A report in Markdown: the text and tables, without the figures."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cropi.report.blocks import Block, Card, Code, Numbers, Picture, Section, Table, Text

# Code, emphasis, HTML, entities, cells, formulas, the middle of a link, and the colon that makes an address a link.
_SPECIAL = re.compile(r"([\\`*_<>|~&$]|(?<=\])[(\[]|:(?=//))")


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The whole document."""
    parts = [f"# {escaped(title)}"]
    for number, section in enumerate(sections, start=1):
        parts.append(f"## {number} {section.title}")
        parts += [text for block in section.blocks if (text := _block(block))]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Text on one line that Markdown shows as it is: no markup, no table cell ended early, no HTML, no link."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def text_table(table: Table) -> str:
    """Render a table for a terminal: Markdown whose columns are as wide as their widest cell, without the caption."""
    rows = [list(table.header), *map(list, table.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.header))]

    def line(row: Sequence[str]) -> str:
        pairs = enumerate(zip(row, widths, strict=True))
        return _line([cell.ljust(width) if n < table.left else cell.rjust(width) for n, (cell, width) in pairs])

    marks = ["-" * width if n < table.left else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    return "\n".join([line(rows[0]), _line(marks), *map(line, rows[1:])])


def _block(block: Block) -> str:
    match block:
        case Text(text=text):
            return text
        case Numbers(numbers=numbers):
            return "\n".join(
                f"- **{escaped(value)}** {escaped(label)} ({escaped(detail)})" for label, value, detail in numbers
            )
        case Table():
            return _table(block)
        case Picture():
            return ""
        case Code(title=title, text=text):
            return f"{escaped(title)}:\n\n{fenced(text)}"
        case Card():
            return _card(block)


def _table(table: Table) -> str:
    marks = [":--" if column < table.left else "--:" for column in range(len(table.header))]
    lines = [_line([escaped(cell) for cell in table.header]), _line(marks)]
    for number, row in enumerate(table.rows):
        cells = [escaped(cell) for cell in row]
        lines.append(_line([f"**{c}**" if c and number == table.strong else c for c in cells]))
    return "\n".join([*([f"{table.caption}\n"] if table.caption else []), *lines])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _card(card: Card) -> str:
    facts = "\n".join(f"- {escaped(label)}: {escaped(value)}" for label, value in card.facts)
    texts = "\n\n".join(f"{escaped(label)}:\n\n{fenced(text)}" for label, text in card.texts)
    table = f"\n\n{_table(card.table)}" if card.table else ""
    return f"### {escaped(card.title)}\n\n{facts}\n\n{texts}{table}"
