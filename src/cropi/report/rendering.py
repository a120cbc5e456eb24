"""Write a report: blocks become one self-contained HTML page and the same in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from cropi.artifacts import write_text
from cropi.errors import printable
from cropi.report.blocks import Section
from cropi.report.markdown import markdown

TEMPLATE = "report.html.jinja"


def write_report(folder: Path, name: str, title: str, sections: Sequence[Section]) -> None:
    """Write `NAME.html` and `NAME.md` to a folder. The same sections give the same bytes."""
    write_text(folder / f"{name}.html", printable(html(title, sections)))
    write_text(folder / f"{name}.md", printable(markdown(title, sections)))


def html(title: str, sections: Sequence[Section]) -> str:
    """Render the page. Everything but the package's own SVG is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = prose
    environment.filters["drawing"] = Markup  # the figures escape the names they show
    text = resources.files("cropi.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(text).render(title=title, sections=sections) + "\n"


def prose(text: str) -> Markup:
    """Escape text and show what stands between backticks as code."""
    pieces = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if place % 2 else escape(piece) for place, piece in enumerate(pieces)
    )
