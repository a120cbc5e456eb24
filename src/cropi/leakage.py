"""Leakage: held-out prompts that stand in another role's set, word for word or nearly. Free of torch.

Roles are train, validation and test. A test prompt is looked for in train and in validation, a validation prompt in
train. A prompt in two sets of one role is no leak.

Two prompts are *exact duplicates* when their texts are equal after Unicode NFKC, case folding and making every run of
white space one space, or when they have the same id. The text is that of all messages but the system's, without
characters that cannot be seen (soft hyphens, zero-width spaces).

Near-duplicates. S(p) are the 5-grams of words of prompt p (words: `words`), without the common ones. The containment of
a held-out prompt h in another prompt o is

    c(h, o) = |S(h) ∩ S(o)| / |S(h)|                 (Broder 1997, On the resemblance and containment of documents)

and h is a near-duplicate of o where c >= 0.6 and every number of h, as often as it occurs there, is a number of o.
5-grams are those of Lee et al. (arXiv 2107.06499); the share of 0.6 is the one that Qwen2.5-Math (arXiv 2409.12122)
asks of the longest common subsequence. What we add is the condition on numbers: problems of one template differ in
nothing else, and one with other numbers has another answer. A gram is common, hence boilerplate, when it stands in
more than `common_limit` prompts: GPT-3 (arXiv 2005.14165, appendix C) ignores grams of more than 10 documents.
Below 20 words any change of a word takes most of the 5-grams with it and chance the rest: such a prompt is a
near-duplicate only of one with the same words in the same order.

Memory: 4096 grams at most of a held-out prompt (a random sample of them where there are more), `common_limit` places
at most per gram, and 2^22 pairs counted at once; training prompts are read in blocks of 2^18 grams and never kept.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

NGRAM = 5
CONTAINMENT = 0.6
SHORT = 20  # words; a shorter prompt is compared as a whole
MAX_GRAMS = (
    4096  # of a held-out prompt; a sample of so many gives the containment to within 0.016 (two standard errors)
)
COMMON_SHARE = 0.02  # of all prompts
COMMON_LEAST, COMMON_MOST = 10, 200
BLOCK_GRAMS = 1 << 18
BLOCK_PAIRS = 1 << 22
EXAMPLES = 3
ROLES = ("train", "validation", "test")  # a prompt may not come again in the set of a later role

_APOSTROPHES = re.compile("['’‘`´]")
_MARKS = frozenset('.,;:?"$\\“”„«»…。、')  # of sentences, quotations and TeX: no words
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
# Scripts without spaces between words: every character is a word.
_SPACELESS = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai to Burmese, Khmer
    r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana, Chinese characters
)
_WORD = re.compile(rf"\d+(?:\.\d+)*|[{_SPACELESS}]|[^\W\d_{_SPACELESS}]+|[^\w\s]")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_WHOLE = np.uint64(0xD6E8FEB86659FD93)  # keeps a whole short text apart from a gram of the same words


@dataclass(frozen=True)
class Match:
    """A held-out prompt and the prompt of another role that it repeats."""

    prompt_id: str
    set: str
    other_id: str
    other_set: str
    containment: float
    text: str  # its beginning

    def __str__(self) -> str:
        if self.prompt_id == self.other_id:
            return f"the prompt {self.prompt_id!r} ({self.text}) is in {self.other_set} and in {self.set}"
        place = f"{self.other_set} as {self.other_id!r}"
        share = "is" if self.containment == 1 else f"is to {self.containment:.0%}"
        return f"the prompt {self.prompt_id!r} ({self.text}) of {self.set} {share} in {place}"


@dataclass(frozen=True)
class Leakage:
    """Exact and near-duplicates: one match per held-out prompt and role that it comes again in, test sets first."""

    exact: tuple[Match, ...]
    near: tuple[Match, ...]

    def as_json(self) -> dict[str, dict[str, int]]:
        """Held-out prompts by kind and by `SET in SET`."""
        return {"exact": _count(self.exact), "near": _count(self.near)}


def _count(matches: Iterable[Match]) -> dict[str, int]:
    return dict(sorted(Counter(f"{match.set} in {match.other_set}" for match in matches).items()))


def described(matches: Sequence[Match]) -> str:
    """How many by set, and the first few of them."""
    counts = ", ".join(f"{name}: {count}" for name, count in _count(matches).items())
    return f"{counts}. " + "; ".join(map(str, matches[:EXAMPLES]))


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
    """Text after NFKC, case folding, making every run of white space one space and dropping what cannot be seen."""
    if text.isascii():
        return " ".join(text.lower().split())
    for _ in range(2):  # folding can take a text out of NFKC, and NFKC can make it foldable again
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold())
    return " ".join(text.split())


def words(text: str) -> list[str]:
    """Words of a text: numbers (`1,000` is `1000`), runs of letters, and any other sign: a `-` or `(` may matter.

    Left out: marks of a sentence, quotes, dollar signs and backslashes. Apostrophes join: `Tom's` is `toms`.
    """
    text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), _APOSTROPHES.sub("", normalised(text)))
    return [word for word in _WORD.findall(text) if word not in _MARKS]


def numbers(text: str) -> Counter[str]:
    """Numbers in a text, with how often each occurs."""
    return Counter(word for word in words(text) if word[0].isdecimal())


def common_limit(prompts: int) -> int:
    """A gram in more prompts than this is boilerplate: 2 % of them, 10 at least and 200 at most."""
    return min(COMMON_MOST, max(COMMON_LEAST, int(COMMON_SHARE * prompts)))


def find_leakage(rows: Sequence[Mapping[str, Any]]) -> Leakage:
    """Exact and near-duplicates among prompts with the columns `prompt_id`, `set` and `messages`.

    The result does not depend on the order of the rows: of several duplicates the one first by set and id is named,
    of several near-duplicates the one of the greatest containment.
    """
    prompts = sorted((_Prompt.of(row) for row in rows), key=lambda p: (p.set, p.prompt_id))
    exact = _exact(prompts)
    found = {(match.set, match.prompt_id, _role(match.other_set)) for match in exact}
    near = [m for m in _near(prompts) if (m.set, m.prompt_id, _role(m.other_set)) not in found]
    return Leakage(tuple(sorted(exact, key=_rank)), tuple(sorted(near, key=_rank)))


def _rank(match: Match) -> tuple[Any, ...]:
    return -ROLES.index(_role(match.set)), match.set, match.prompt_id, match.other_set, match.other_id


def _role(name: str) -> str:
    return name.split("/")[0]


@dataclass(frozen=True)
class _Prompt:
    prompt_id: str
    set: str
    role: int
    messages: str
    digest: bytes  # of the normalised text; empty where that is

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> _Prompt:
        text = normalised(prompt_text(row["messages"]))
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() if text else b""
        return cls(row["prompt_id"], row["set"], ROLES.index(_role(row["set"])), row["messages"], digest)

    @property
    def text(self) -> str:
        return prompt_text(self.messages)

    def match(self, other: _Prompt, containment: float) -> Match:
        beginning = " ".join(self.text[:120].split())[:60]
        return Match(self.prompt_id, self.set, other.prompt_id, other.set, containment, beginning)


def _exact(prompts: Sequence[_Prompt]) -> list[Match]:
    first: dict[str | bytes, dict[int, _Prompt]] = {}
    for prompt in prompts:
        for mark in (prompt.digest, prompt.prompt_id):
            if mark:
                first.setdefault(mark, {}).setdefault(prompt.role, prompt)
    matches = []
    for prompt in prompts:
        same_text, same_id = first.get(prompt.digest, {}), first.get(prompt.prompt_id, {})
        for role in range(prompt.role):
            other = same_text.get(role) or same_id.get(role)
            if other is not None:
                matches.append(prompt.match(other, 1.0))
    return matches


# -- near-duplicates ---------------------------------------------------------------------------------------------------


def _near(prompts: Sequence[_Prompt]) -> Iterator[Match]:
    """The best near-duplicate of every held-out prompt in each earlier role."""
    # A text that a role holds many times over counts once, lest its grams look common.
    texts: dict[tuple[int, bytes], list[_Prompt]] = {}
    for prompt in prompts:
        texts.setdefault((prompt.role, prompt.digest), []).append(prompt)
    groups = list(texts.values())
    held_out = [group for group in groups if group[0].role > 0]
    train = [group[0] for group in groups if group[0].role == 0]
    others = [*(group[0] for group in held_out), *train]  # a number of a held-out prompt is its number here, too
    index = _index(held_out, train)
    candidates: dict[tuple[int, int], list[tuple[float, int]]] = {}
    for h, o, containment in _containments(index, len(held_out)):
        role = others[o].role
        if role < others[h].role:
            candidates.setdefault((h, role), []).append((containment, o))
    counted = lru_cache(maxsize=1024)(lambda o: numbers(others[o].text))
    for (h, _), pairs in candidates.items():
        pairs.sort(key=lambda pair: (-pair[0], others[pair[1]].set, others[pair[1]].prompt_id))
        best = next(((c, o) for c, o in pairs if counted(h) <= counted(o)), None)
        if best is not None:
            yield from (prompt.match(others[best[1]], best[0]) for prompt in held_out[h])


@dataclass(frozen=True)
class _Index:
    """Grams of the held-out prompts but the common ones, and where grams stand. E entries, L places."""

    held_out_E: np.ndarray  # ascending
    gram_E: np.ndarray
    gram_L: np.ndarray  # ascending
    place_L: np.ndarray
    size_H: np.ndarray  # grams of each held-out prompt


def _index(held_out: Sequence[Sequence[_Prompt]], train: Sequence[_Prompt]) -> _Index:
    """The inverted index of the held-out prompts; places number the held-out prompts first, then those of train."""
    grams = [_grams(group[0].text)[:MAX_GRAMS] for group in held_out]
    held_out_E = np.repeat(np.arange(len(grams)), [len(row) for row in grams])
    known_G, gram_E = np.unique(np.concatenate([np.empty(0, np.uint64), *grams]), return_inverse=True)
    frequency_G = np.bincount(gram_E, minlength=len(known_G))
    limit = common_limit(len(held_out) + len(train))
    parts = [(gram_E, held_out_E)]
    for gram_B, place_B in _blocks(train, len(held_out)):
        at_B = np.minimum(np.searchsorted(known_G, gram_B), max(len(known_G) - 1, 0))
        hit_B = known_G[at_B] == gram_B if len(known_G) else np.zeros(len(gram_B), bool)
        at_B, place_B = at_B[hit_B], place_B[hit_B]
        kept_B = frequency_G[at_B] <= limit  # what is common by now need not be kept
        np.add.at(frequency_G, at_B, 1)
        parts.append((at_B[kept_B], place_B[kept_B]))
    rare_E = frequency_G[gram_E] <= limit
    gram_L, place_L = (np.concatenate(column) for column in zip(*parts, strict=True))
    order_L = np.argsort(gram_L, kind="stable")
    size_H = np.bincount(held_out_E[rare_E], minlength=len(grams))
    return _Index(held_out_E[rare_E], gram_E[rare_E], gram_L[order_L], place_L[order_L], size_H)


def _blocks(train: Sequence[_Prompt], offset: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Grams of some training prompts at a time, with the numbers of the prompts."""
    grams: list[np.ndarray] = []
    sizes: list[int] = []
    total = done = 0
    for read, prompt in enumerate(train, start=1):
        grams.append(_grams(prompt.text))
        sizes.append(len(grams[-1]))
        total += sizes[-1]
        if read == len(train) or total >= BLOCK_GRAMS:
            yield np.concatenate(grams), np.repeat(np.arange(offset + done, offset + read), sizes)
            grams, sizes, total, done = [], [], 0, read


def _containments(index: _Index, held_out: int) -> Iterator[tuple[int, int, float]]:
    """(held-out prompt, other prompt, containment) wherever that is large enough."""
    start_E = np.searchsorted(index.gram_L, index.gram_E)
    count_E = np.searchsorted(index.gram_L, index.gram_E, side="right") - start_E
    first_H = np.searchsorted(index.held_out_E, np.arange(held_out + 1))
    pairs_H = np.concatenate([[0], np.cumsum(count_E)])[first_H]
    places = int(index.place_L.max(initial=0)) + 1
    start = 0
    while start < held_out:
        stop = max(start + 1, int(np.searchsorted(pairs_H, pairs_H[start] + BLOCK_PAIRS, side="right")) - 1)
        block = slice(first_H[start], first_H[stop])
        lengths = count_E[block]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        place = index.place_L[np.repeat(start_E[block], lengths) + within]
        pair, shared = np.unique(np.repeat(index.held_out_E[block], lengths) * places + place, return_counts=True)
        held, other = np.divmod(pair, places)
        containment = shared / index.size_H[held]
        close = (containment >= CONTAINMENT) & (held != other)
        yield from zip(held[close].tolist(), other[close].tolist(), containment[close].tolist(), strict=True)
        start = stop


def _grams(text: str) -> np.ndarray:
    """Hashes of the distinct grams of a text, ascending: polynomials in the hashes of their words, modulo 2^64."""
    hashes = np.array([_word_hash(word) for word in words(text)], dtype=np.uint64)
    if not len(hashes):
        return hashes
    size = NGRAM if len(hashes) >= SHORT else len(hashes)
    total = np.full(len(hashes) - size + 1, _WHOLE if len(hashes) < SHORT else 0, dtype=np.uint64)
    for place in range(size):
        total = total * _FACTOR + hashes[place : place + len(total)]
    return np.unique(total)


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
