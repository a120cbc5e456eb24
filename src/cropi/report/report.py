"""`report`: one self-contained HTML page, the same in Markdown, and the numbers in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from cropi.artifacts import write_json, write_text
from cropi.config import Config
from cropi.errors import printable
from cropi.report.blocks import Section
from cropi.report.contents import read_contents, sections
from cropi.report.markdown import markdown
from cropi.report.summary import Summary, summarise
from cropi.run_folder import RunFolder

TEMPLATE = "report.html.jinja"


def make_report(config: Config, folder: Path) -> Summary:
    """Write `report.html`, `report.md` and `summary.json` to a run's folder, from what the folder holds.

    A run may be reported at any time: what is not there yet is left out and said to be. The same folder gives the same
    bytes. Raises ArtifactError where a file of the run is corrupt.
    """
    run = RunFolder(config)
    summary = summarise(config, run)
    parts = sections(read_contents(config, run, summary))
    title = f"cropi run {config.name}"
    write_text(folder / "report.html", printable(html(title, parts)))
    write_text(folder / "report.md", printable(markdown(title, parts)))
    write_json(folder / "summary.json", summary.as_json())
    return summary


def html(title: str, parts: Sequence[Section]) -> str:
    """The page. Everything that is not the package's own SVG is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = prose
    environment.filters["drawing"] = Markup  # the figures escape the names they show
    text = resources.files("cropi.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(text).render(title=title, sections=parts) + "\n"


def prose(text: str) -> Markup:
    """Escaped text in which what stands between backticks is code."""
    pieces = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if place % 2 else escape(piece) for place, piece in enumerate(pieces)
    )
