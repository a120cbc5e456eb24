"""Write a report: blocks become one self-contained HTML page and the same in Markdown."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from cropi.artifacts import write_text
from cropi.errors import printable
from cropi.report.blocks import Section
from cropi.report.charts import chart_data
from cropi.report.formulas import with_formulas
from cropi.report.markdown import markdown

LIBRARY = "uplot-1.6.32.min"
RELOAD_S = 20  # of the page of a run that goes on


def write_report(folder: Path, name: str, title: str, sections: Sequence[Section], *, live: bool = False) -> None:
    """Write `NAME.html` and `NAME.md` to a folder. The same sections give the same bytes."""
    write_text(folder / f"{name}.html", printable(html(title, sections, live=live)))
    write_text(folder / f"{name}.md", printable(markdown(title, sections)))


def html(title: str, sections: Sequence[Section], *, live: bool = False) -> str:
    """Render the page. Everything but the package's own SVG, style and script is escaped; no other script may run."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"prose": prose, "plain": plain, "chart_data": chart_data, "formulas": with_formulas}
    script = f"/* uPlot: {_part('uplot-LICENSE')}*/\n{_part(f'{LIBRARY}.js')}{_part('page.js')}"
    return environment.from_string(_part("report.html.jinja")).render(
        title=title,
        sections=sections,
        reload_s=RELOAD_S if live else None,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        library_style=_part(f"{LIBRARY}.css"),
    )


def _part(name: str) -> str:
    return resources.files("cropi.report").joinpath("page", name).read_text(encoding="utf-8")


def plain(text: str) -> str:
    """Prose where no markup can be."""
    return text.replace("`", "")


def prose(text: str) -> Markup:
    """Escape text and show what stands between backticks as code."""
    pieces = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if place % 2 else escape(piece) for place, piece in enumerate(pieces)
    )
