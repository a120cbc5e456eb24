"""The length of the sentences that the reports compose."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from cropi.report.blocks import Picture, Section, Table, Text

MAX_WORDS = 25


def composed(sections: Iterable[Section]) -> Iterator[str]:
    """Prose, captions and the words of definitions; not what comes from data."""
    for section in sections:
        for block in section.blocks:
            yield from _texts(block)


def _texts(block: Any) -> list[str]:
    if isinstance(block, Text):
        return [block.text]
    if isinstance(block, Table) and block.header == ["term", "meaning"]:
        return [cell for row in block.rows for cell in row]
    return [block.caption] if isinstance(block, Table | Picture) else []


def too_long(sections: Iterable[Section]) -> list[str]:
    """Sentences of too many words; numbers and signs do not count."""
    sentences = [sentence for text in composed(sections) for sentence in re.split(r"(?<=[.!?]) ", text)]
    return [one for one in sentences if sum(any(c.isalpha() for c in word) for word in one.split()) > MAX_WORDS]
