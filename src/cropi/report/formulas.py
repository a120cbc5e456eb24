"""LaTeX in data and answers as MathML, which browsers draw by themselves; the source shows on hover."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from xml.etree.ElementTree import Element  # builds nothing from text, so no parser is attacked

from latex2mathml.converter import convert_to_element
from markupsafe import Markup, escape

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
    inner = Markup("").join([escape(html.unescape(element.text or "")), *map(_written, element)])
    return Markup("<{0}{1}>{2}</{0}>").format(element.tag, attributes, inner)
