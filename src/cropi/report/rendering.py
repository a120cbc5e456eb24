"""Write a report: blocks become one self-contained HTML page and the same in Markdown, without the figures."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from html import unescape
from importlib import resources
from pathlib import Path
from xml.etree.ElementTree import Element  # builds nothing from text, so no parser is attacked

from jinja2 import Environment, StrictUndefined
from latex2mathml.converter import convert_to_element
from markupsafe import Markup, escape

from cropi.artifacts import write_text
from cropi.errors import printable
from cropi.report.blocks import Block, Card, Code, Numbers, Picture, Section, Table, Text, table_row
from cropi.report.figures import chart_data

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
    lines = [table_row([escaped(cell) for cell in table.header]), table_row(marks)]
    for number, row in enumerate(table.rows):
        cells = [escaped(cell) for cell in row]
        lines.append(table_row([f"**{c}**" if c and number == table.strong else c for c in cells]))
    return "\n".join([*([f"{table.caption}\n"] if table.caption else []), *lines])


def _card(card: Card) -> str:
    facts = "\n".join(f"- {escaped(label)}: {escaped(value)}" for label, value in card.facts)
    texts = "\n\n".join(f"{escaped(label)}:\n\n{fenced(text)}" for label, text in card.texts)
    table = f"\n\n{_table(card.table)}" if card.table else ""
    return f"### {escaped(card.title)}\n\n{facts}\n\n{texts}{table}"


# -- formulas: LaTeX in data and answers as MathML, whose source shows on hover ------------------------------------

LONGEST = 600  # characters of a formula that is drawn
DELIMITED = re.compile(
    rf"\$\$(.{{1,{LONGEST}}}?)\$\$|\$(?!\s)([^$\n]{{1,{LONGEST}}}?)(?<!\s)\$(?!\d)"
    rf"|\\\((.{{1,{LONGEST}}}?)\\\)|\\\[(.{{1,{LONGEST}}}?)\\\]|(?=(\\boxed\{{))",
    re.DOTALL,
)
MATHEMATICAL = re.compile(r"\\[a-zA-Z]|[\^_=<>+]|^-?([a-zA-Z]|[\d.,]+)$")  # unlike the text between two prices
BARE = re.compile(r"(?!.*(?<![\\a-zA-Z])[a-zA-Z]{2})[^\n]*\\[a-zA-Z][^\n]*")  # a command, and no words
TAGS = {"math", "mrow", "mi", "mn", "mo", "ms", "mtext", "mspace", "msqrt", "mroot", "mfrac", "msub", "msup", "msubsup"}
TAGS |= {"munder", "mover", "munderover", "mtable", "mtr", "mtd", "mstyle", "mpadded", "mphantom", "menclose"}
ATTRIBUTES = {"display", "stretchy", "fence", "form", "separator", "lspace", "rspace", "width", "mathvariant", "accent"}
ATTRIBUTES |= {"linethickness", "displaystyle", "scriptlevel", "columnalign", "notation"}
PLAIN_VALUE = re.compile(r"[\w.%+ -]*")


def with_formulas(text: str) -> Markup:
    """Escape text, with every formula in it drawn. What cannot be drawn stays as it is written."""
    return Markup("").join(_pieces(text))


def _pieces(text: str) -> Iterator[Markup]:
    if BARE.fullmatch(text) and not DELIMITED.search(text):
        yield drawn(text, text)
        return
    done = 0
    for match in DELIMITED.finditer(text):
        end = _closing(text, match.start()) if match[5] else match.end()
        source = text[match.start() : end]
        inner = source if match[5] else next(part for part in match.groups() if part)
        if match.start() < done or not source or not MATHEMATICAL.search(inner):
            continue
        yield escape(text[done : match.start()])
        yield drawn(source, inner)
        done = end
    yield escape(text[done:])


def _closing(text: str, start: int) -> int:
    """The end of a group in braces, or its start if it never ends."""
    depth = 0
    for place in range(text.index("{", start), min(len(text), start + LONGEST)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return place + 1
    return start


def drawn(source: str, formula: str) -> Markup:
    """A formula as MathML; its source, escaped, where it is too long or no LaTeX."""
    if len(formula) > LONGEST:
        return escape(source)
    try:
        tree = convert_to_element(formula)
    except Exception:  # the library raises many kinds, and IndexError besides
        return escape(source)
    if any(element.tag not in TAGS or "\\" in (element.text or "") for element in tree.iter()):
        return escape(source)  # a command that it does not know
    tree.set("title", source)
    return _written(tree)


def _written(element: Element) -> Markup:
    """The element with what is harmless: the library itself escapes nothing and lets `href` and `style` through."""
    kept = {name: value for name, value in element.items() if name in ATTRIBUTES and PLAIN_VALUE.fullmatch(value)}
    kept |= {"title": element.get("title", "")} if element.tag == "math" else {}
    attributes = Markup("").join(Markup(' {}="{}"').format(name, value) for name, value in kept.items())
    inner = Markup("").join([escape(unescape(element.text or "")), *map(_written, element)])
    return Markup("<{0}{1}>{2}</{0}>").format(element.tag, attributes, inner)
