"""The text of prompts: of chat messages, normalised, and as words and numbers. Free of torch."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any

_APOSTROPHES = re.compile("['’‘`´]")
_MARKS = frozenset('.,;:?"$\\“”„«»…。、')  # of sentences, quotations and TeX: no words
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
# Scripts without spaces between words (Thai to Burmese, Khmer, kana, Chinese): every character is a word.
_SPACELESS = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"\d+(?:\.\d+)*|[{_SPACELESS}]|[^\W\d_{_SPACELESS}]+|[^\w\s]")


def prompt_text(messages: str) -> str:
    """The text of a prompt table's `messages`: a string, or the contents of all chat messages but the system's."""
    value = json.loads(messages)
    if isinstance(value, str):
        return value
    return "\n".join(turn_text(turn) for turn in value if turn["role"] != "system")


def turn_text(turn: Mapping[str, Any]) -> str:
    """The text of a chat message: its content, or the texts of its parts, with its reasoning and tool calls."""
    content = turn.get("content") or ""
    parts = [content] if isinstance(content, str) else [part["text"] for part in content]
    said = [turn[name] for name in ("reasoning_content", "tool_calls") if turn.get(name)]
    return "\n".join([*parts, *(one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in said)])


def last_turn(messages: str) -> str:
    """The text of a prompt table's `messages`: a string, or the last chat message."""
    value = json.loads(messages) if messages else ""
    return value if isinstance(value, str) else turn_text(value[-1])


def normalised(text: str) -> str:
    """Text after NFKC and case folding, with single spaces and without invisible characters."""
    if text.isascii():
        return " ".join(text.lower().split())
    for _ in range(2):  # folding can take a text out of NFKC, and NFKC can make it foldable again
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold())
    return " ".join(text.split())


def words(text: str) -> list[str]:
    """Words of a text: numbers (`1,000` is `1000`), runs of letters (`Tom's` is `toms`), and signs such as `-`."""
    text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), _APOSTROPHES.sub("", normalised(text)))
    return [word for word in _WORD.findall(text) if word not in _MARKS]


def numbers(text: str) -> Counter[str]:
    """Numbers in a text, with how often each occurs."""
    return Counter(word for word in words(text) if word[0].isdecimal())
