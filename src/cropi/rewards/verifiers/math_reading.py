r"""Find the answer in a completion and bring it into a normal form: words alone, or LaTeX values with units.

In the normal form, words that were text in LaTeX are written ⟦so⟧. Plain letters are a unit only at the end of a value,
and only two or more of them.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from typing import Any, NamedTuple

from cropi.rewards.verifiers.boxed import last_boxed, plain_latex
from cropi.rewards.verifiers.numeric import plain_signs

Unit = tuple[tuple[str, int], ...]  # units of measure and their powers, in alphabetical order
PERCENT: Unit = (("%", 1),)  # stays with the value: it changes it

_MARKS = " \t\n\r*_`$:"  # Markdown, dollar signs and the colon of an announcement
_ANNOUNCED = re.compile(
    r"####|(?<![a-z])answers?(?![a-z])[*_]*(?:\s+(?:is|are)\b(?!\s+(?:not|correct|incorrect)\b)|\s*[:=])"
    r"|^[#*_ \t]*(?:the\s+)?(?:final\s+)?answer[#*_ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
_CLAUSE = re.compile(  # where an announced answer ends
    r"\n|[.!?;](?=[\s*]|$)|(?:,|(?<![\s,]))\s+(?:so|because|since|as|which|where|hence|thus|therefore|but|by|not"
    r"|(?:and\s+)?(?:we|I|it|this|that|so))\b"
)
_FORMULA = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)

# Signs that the library does not read; ⟦, ⟧ and \x1f are ours and may not come from an answer.
_SIGNS = str.maketrans({
    "∞": r"\infty ", "·": r"\cdot ", "²": "^2", "³": "^3", "½": r"\frac12 ", "…": "...", "⟦": "", "⟧": "", "\x1f": "",
})  # fmt: skip
_SPELLINGS: list[tuple[str, Any]] = [  # spellings, and the one that is compared
    (r"\\(?:math|text)(?:rm|bf|it) +(\w)", r"\1"),
    (r"\\!|\\(?:(?:display|text)style|limits|[bB]igg?[lr]?)(?![A-Za-z])", ""),
    (r"(?<!\\)\$|\\(?:[()]|[][]$)|^\\\[", ""),
    (r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s)+", " "),
    (r"(?<![\d.,])\d{1,3}(?:(?: |\{,\})\d{3})+(?!\d)", lambda found: re.sub(r"\D", "", found[0])),
    (r"\\(?:[lc]?dots|dotsc)(?![A-Za-z])", "..."),
    (r"^\s*(?:\\approx|≈)", ""),
    (r"\\varnothing", r"\\emptyset"),
    (r"(\d{0,20})\.(\d{0,20})\\(?:overline|bar)\s*{(\d{1,20})}", lambda found: _recurring(*found.groups())),
    (r"(?<![\w^\\}.])(\d{1,20})\s*\\frac\s*{(\d{1,20})}\s*{(\d{1,20})}", lambda found: _mixed(*found.groups())),
    (r"(?<![\w^\\}.])(\d{1,20})\s+(\d{1,20})\s*/\s*(\d{1,20})(?![\d.])", lambda found: _mixed(*found.groups())),
    (r"(?<![\w.])([\d.]+)[eE]([-+]?\d{1,3})(?![\w.])", r"\1\\times 10^{\2}"),
    (r"⟦?\b([ap])⟧?\.\s?⟦?m\b⟧?\.?", r"⟦\1m⟧"),
    (r"(?:⟦|(?<![\\A-Za-z]))(pi|infinity|sin|cos|tan|cot|csc|ln|log|exp)(?:⟧|(?![A-Za-z]))", r"\\\1 "),
    (r"\s*(?:⟦|\b)(?i:percent(?:age)?|pct)(?:⟧|\b)", r"\\%"),
    (r"\^-(\d+)", r"^{-\1}"),
    (r"\*\*", "^"),
]  # fmt: skip
_TEXT = re.compile(r"\\(?:text[a-z]*|math(?:rm|bf|it|sf|normal)|boldsymbol|bm|[mh]box)\s*{((?:[\^_]{[^{}]*}|[^{}])*)}")
_LETTERS = r"[^\W\d_]"
_WORD = re.compile(rf"\\[A-Za-z]+|{_LETTERS}+")
_WORDS = re.compile(
    rf"[(\['\"“‘`]*{_LETTERS}+(?:(?:[ ,;'’]|\. |(?<={_LETTERS}{{2}})-|-(?={_LETTERS}{{2}}))+{_LETTERS}+)*[)\]'\"”’.,]*"
)
_BETWEEN = re.compile(r"\s*(?:,\s*)?(?:⟦(?:and|or)⟧|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*", re.IGNORECASE)
_SYMBOLS = re.compile(
    r"[a-zA-Zα-ωΑ-Ω]|(?:(?![eio])[a-z]|(?![EIO])[A-Z]){2}|(?:(?![aeiou])[a-z]){3,}|abcd?"
)  # else it is a word


def _mixed(whole: str, top: str, bottom: str) -> str:
    return f"\\frac{{{int(whole) * int(bottom) + int(top)}}}{{{bottom}}}"


def _recurring(whole: str, fixed: str, period: str) -> str:
    shift = 10 ** len(fixed)
    nines = (10 ** len(period) - 1) * shift
    return f"\\frac{{{int(whole + fixed + period) - int(whole + fixed or 0)}}}{{{nines}}}"


class Answer(NamedTuple):
    """An answer in normal form."""

    written: str  # without spacing and wrapping
    words: tuple[str, ...] | None  # if it is letters alone: its words, or items between commas, sorted
    is_text: bool  # whether it holds words that cannot be a formula
    values: list[str]  # LaTeX without text and units
    units: list[Unit]


def answer_text(text: str, *, boxed_only: bool) -> str | None:
    r"""The last `\boxed{...}` that closes, else what follows the last `####`, `answer is` or `answer:`."""
    boxed = last_boxed(text)
    if boxed is not None:
        return bare(boxed)
    announced = None
    if not boxed_only:
        for announced in _ANNOUNCED.finditer(text):  # noqa: B007 - the last one is wanted
            pass
    return None if announced is None else bare(_clause(text[announced.end() :].lstrip(_MARKS.replace("$", ""))))


def _clause(text: str) -> str:
    """The start of a text up to the end of the answer. A formula is kept whole."""
    formula, clause = _FORMULA.match(text), _CLAUSE.search(text)
    if formula is None:
        return text[: clause.start()] if clause else text
    inner = next(filter(None, formula.groups()))
    rest = text[formula.end() :]
    end = _CLAUSE.search(rest)
    rest = rest[: end.start()] if end else rest
    return f"{inner} {rest}"


def bare(text: str) -> str:
    """The text without surrounding white space, Markdown, dollar signs and full stop."""
    text = text.strip().lstrip(_MARKS)
    short = text.rstrip(_MARKS)
    if short.endswith("\\"):
        short = text[: len(short) + 1]  # a dollar sign or a space that is escaped
    return short if short.endswith("..") else short.removesuffix(".").rstrip(_MARKS.replace("$", ""))


@lru_cache(maxsize=10_000)
def read(text: str) -> Answer:
    """The normal form of an answer."""
    while (inner := last_boxed(text)) is not None:
        text = inner
    text = plain_signs(text).translate(_SIGNS)
    for _ in range(3):  # from the inside out
        text = _TEXT.sub(lambda text: _WORD.sub(lambda w: w[0] if w[0][0] == "\\" else f"⟦{w[0]}⟧", text[1]), text)
    for spelling, same in _SPELLINGS:
        text = re.sub(spelling, same, text)
    text = text.strip()
    plain = re.sub("[⟦⟧]", "", text)
    written = plain_latex(plain)
    if not re.search(rf"{_LETTERS}|\\", re.sub("⟦[^⟧]*⟧", "", text)):  # all letters are text
        written = written.casefold()
    words = None
    if _WORDS.fullmatch(plain):
        items = [re.findall(rf"{_LETTERS}+", item) for item in re.split("[,;]", _BETWEEN.sub(",", plain))]
        words = tuple(sorted(" ".join(item).casefold() for item in items if item))
    values, units = without_units(_BETWEEN.sub(",", text))
    values = [
        re.sub(rf"⟦({_LETTERS})⟧", r"\1", re.sub(r"(?<=[A-Za-z])_{?⟦(\w+)⟧}?", r"_{\1}", value)) for value in values
    ]
    runs = re.findall(rf"{_LETTERS}+", plain) if words is not None else []
    if "%" in text:
        values, units = [value.removesuffix("\\%").removesuffix("%") for value in values], [*units, PERCENT]
    is_text = any("⟦" in value or "..." in value for value in values) or not all(
        _SYMBOLS.fullmatch(run) for run in runs
    )
    return Answer(written, words, is_text, values, units)


# Units that may stand beside a value, with their spellings; plurals in -s and -es are added.
_MEASURES = """
m meter metre|cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre|nm nanometer|inch in
foot ft feet|yard yd|mile mi|g gram gramme gm|kg kilogram kilo|mg milligram|ton tonne|pound lb|ounce oz
s sec second|ms millisecond|min minute|h hr hour|day|week wk|month|year yr|decade|century centurie|am|pm
L l liter litre|mL ml milliliter millilitre|gallon gal|quart qt|pint|cup|acre|hectare ha|N newton|J joule|kJ|W watt|kW
V volt|A amp ampere|ohm|Pa pascal|Hz hertz|kHz|MHz|K kelvin|C celsius|F fahrenheit|mol mole|cal calorie|kcal|bit|byte
mile/h mph|km/h kph kmh kmph|rpm|radian rad|degree deg °|dollar usd buck|cent ¢|€ euro|£ gbp|¥ yen|₹ rupee rs
person people|man men|woman women|child children|die dice|vertex vertice|penny pennie|candy candie
"""
_COUNTED = """
unit point time way student boy girl adult kid player member team class game match book page word letter card coin
marble ball toy block tile cube box bag bottle jar piece slice pie cake cookie apple orange banana egg flower tree
plant seed animal dog cat cow bird chicken rabbit fish monkey horse sheep car truck bus train bike plane boat house
room table chair seat desk ticket stamp sticker pencil pen crayon shirt shoe sock hat ribbon nickel dime quarter side
edge face corner diagonal angle triangle square rectangle circle line segment region term digit number integer
solution root factor divisor multiple zero prime pair group set row column step lap trip turn round vote worker
employee customer guest friend family teacher doctor soldier mark arrangement combination permutation outcome element
subset path sequence pupil problem question test goal item object dot muffin cupcake sandwich pizza meal gift present
bead button stick rope brick
"""
_NAMES = {
    writing: line.split()[0]
    for line in [*re.split(r"[|\n]", _MEASURES.strip()), *_COUNTED.split()]
    for name in line.split()
    for writing in ((name, name + "s", name + "es") if len(name) > 1 else (name,))
}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_CURRENCY = {r"\$": "dollar", "€": "€", "£": "£", "¥": "¥", "₹": "₹"}
_PRICE = re.compile(r"(\\\$|[€£¥₹])\s*([-+]?[\d.,]*\d|[^\d,;]*$|\\[^,;]*)|([\d}])\s*(\\\$|[€£¥₹])")
_ELEMENT = (
    r"(?:⟦(?P<text{0}>[^⟧]+)⟧|(?<![A-Za-z\\⟦])(?P<bare{0}>[A-Za-z]{{2,}})(?![A-Za-z⟧])|(?P<sign{0}>[¢°]))\.?"
    r"(?:\s*\^\s*{{?\s*(?P<power{0}>-?\d)\s*}}?|(?<=⟧)(?P<digit{0}>[23])(?!\d))?"
)
_ONE = re.compile(r"(?P<over>/)?\s*(?:\\cdot|[·*-])?\s*" + _ELEMENT.format(""))
_RUN = re.compile(
    rf"(?<=[\w)}}\]|])\s*(?:{_ELEMENT.format(1)})(?:\s*(?:/|\\cdot(?![A-Za-z])|[·*-])?\s*(?:{_ELEMENT.format(2)}))*"
)
_FRACTION = re.compile(r"\\frac\s*{\s*((?:⟦\w+⟧(?:\^\d)?\s*)+)}\s*{\s*((?:⟦\w+⟧(?:\^\d)?\s*)+)}")
_LETTER = re.compile(r"([-+]?[\d.,]*\d)\s+([mgshLlNJWVKF])")  # 5 m, not 5m


def without_units(latex: str) -> tuple[list[str], list[Unit]]:
    """Split an answer into values and units. It is cut after each unit if there are several."""
    latex = re.sub(r"\^\s*{?\s*\\circ\s*}?|\\degree", "°", _FRACTION.sub(r"\1/\2", latex))
    latex = re.sub("°\\s*([CF])$", "°⟦\\1⟧", _LETTER.sub(r"\1⟦\2⟧", latex) if _LETTER.fullmatch(latex) else latex)
    latex = _PRICE.sub(lambda at: f"{at[2] or at[3] or ''}⟦{_CURRENCY[at[1] or at[4]]}⟧", latex)
    found = list[Unit]()

    def cut(run: re.Match[str]) -> str:
        unit = _unit(run[0])
        after = latex[run.end() :].lstrip()
        if unit is None or ("⟦" not in run[0] and after and not re.match(r"[\d,;)\]]", after)):
            return run[0]
        found.append(unit)
        return "\x1f"

    cut_up = _RUN.sub(cut, latex)
    if len(set(found)) > 1:  # 2 hours 30 minutes
        values = [part.strip(" ,") for part in cut_up.split("\x1f")]
        return (values[:-1] if not values[-1] else values), found
    return [cut_up.replace("\x1f", " ").strip()], found[:1]


def _unit(run: str) -> Unit | None:
    """Base units with their powers; None if a word is no unit."""
    powers, sign, factor = Counter[str](), 1, 1
    elements = list(_ONE.finditer(run))
    for at, one in enumerate(elements):
        name = one["text"] or one["bare"] or one["sign"]
        if name.casefold() == "per":
            sign = -1
            continue
        if name.casefold() in _POWERS and at + 1 < len(elements):
            factor = _POWERS[name.casefold()]
            continue
        known = _NAMES.get(name) or (_NAMES.get(name.casefold()) if len(name) > 1 else None)
        if known is None:
            return None
        top, _, bottom = known.partition("/")
        sign = -1 if one["over"] else sign
        powers[top] += sign * factor * int(one["power"] or one["digit"] or 1)
        if bottom:
            powers[bottom] -= sign
        sign, factor = 1, 1
    return tuple(sorted(powers.items())) or None
