r"""What a completion gives as its answer, and its normal form: words alone, or values in LaTeX with units."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

from cropi.rewards.units import PERCENT, Unit, without_units
from cropi.rewards.verifiers import last_boxed, plain_latex, plain_signs

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

_SIGNS = str.maketrans({
    "π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "²": "^2", "³": "^3",
    "½": r"\frac12 ", "…": "...", "⟦": "", "⟧": "", "\x1f": "",
})  # fmt: skip
_SPELLINGS: list[tuple[str, Any]] = [  # what is written in several ways, and the one way that is compared
    (r"\\(?:math|text)(?:rm|bf|it) +(\w)", r"\1"),
    (r"\\!|\\(?:left|right|(?:display|text)style|limits|[bB]igg?[lr]?)(?![A-Za-z])", ""),
    (r"(?<!\\)\$|\\(?:[()]|[][]$)|^\\\[", ""),
    (r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s)+", " "),
    (r"(?<![\d.,])\d{1,3}(?:(?: |\{,\})\d{3})+(?!\d)", lambda found: re.sub(r"\D", "", found[0])),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:[lc]?dots|dotsc)(?![A-Za-z])", "..."),
    (r"^\s*(?:\\approx|≈)", ""),
    (r"\\varnothing", r"\\emptyset"),
    (r"(\d{0,20})\.(\d{0,20})\\(?:overline|bar)\s*{(\d{1,20})}", lambda found: _recurring(*found.groups())),
    (r"(?<![\w^\\}.])(\d{1,20})\s*\\frac\s*{(\d{1,20})}\s*{(\d{1,20})}", lambda found: _mixed(*found.groups())),
    (r"(?<![\w^\\}.])(\d{1,20})\s+(\d{1,20})\s*/\s*(\d{1,20})(?![\d.])", lambda found: _mixed(*found.groups())),
    (r"(?<![\w.])([\d.]+)[eE]([-+]?\d{1,3})(?![\w.])", r"\1\\times 10^{\2}"),
    (r"⟦?\b([ap])⟧?\.\s?⟦?m\b⟧?\.?", r"⟦\1m⟧"),
    (r"(?:⟦|(?<![\\A-Za-z]))(pi|infinity|sin|cos|tan|cot|csc|ln|log|exp)(?:⟧|(?![A-Za-z]))", r"\\\1 "),
    (r"\\infinity", r"\\infty"),
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

    written: str  # spacing and wrapping aside
    words: tuple[str, ...] | None  # where it is letters alone: words, or what stands between their commas, sorted
    is_text: bool  # whether it holds words that no formula could be made of
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
    """The start of a text up to the end of the answer: formulas are kept whole, with what joins them."""
    formula, clause = _FORMULA.match(text), _CLAUSE.search(text)
    if formula is None:
        return text[: clause.start()] if clause else text
    inner = next(filter(None, formula.groups()))
    rest = text[formula.end() :]
    end = _CLAUSE.search(rest)
    rest = rest[: end.start()] if end else rest
    return f"{inner} {rest}"


def bare(text: str) -> str:
    """Without white space, Markdown, dollar signs and the full stop around it."""
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
