"""Leakage: held-out prompts that stand in another role's set, word for word or nearly. Free of torch.

Roles are train, validation and test. A test prompt is looked for in train and validation, a validation prompt in train.

*Exact duplicates* have the same id, or the same text after Unicode NFKC, case folding and collapsing white space. The
text is that of all messages but the system's, without invisible characters.

*Near-duplicates*: S(p) are the word 5-grams of prompt p, without the common ones. A held-out prompt h is a
near-duplicate of o if its containment in o (Broder 1997) is at least 0.6 and o has every number of h as often:

    c(h, o) = |S(h) ∩ S(o)| / |S(h)| >= 0.6

The condition on numbers is ours: problems of one template differ in nothing else. A gram in more than `common_limit`
prompts is boilerplate. A prompt below 20 words is a near-duplicate only of one with the same words in the same order.
Sources: 5-grams, Lee et al. (arXiv 2107.06499); 0.6, Qwen2.5-Math (arXiv 2409.12122); boilerplate, GPT-3 (2005.14165).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from cropi.prompt_text import normalised, numbers, prompt_text, words

NGRAM = 5
CONTAINMENT = 0.6
SHORT = 20  # words; a shorter prompt is compared as a whole
MAX_GRAMS = 4096  # of a held-out prompt; a sample of so many gives the containment to within 0.016
COMMON_SHARE, COMMON_LEAST, COMMON_MOST = 0.02, 10, 200  # of all prompts
EXAMPLES = 3
ROLES = ("train", "validation", "test")  # a prompt may not come again in the set of a later role


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
    """Describe matches: counts by set, and the first few."""
    counts = ", ".join(f"{name}: {count}" for name, count in _count(matches).items())
    return f"{counts}. " + "; ".join(map(str, matches[:EXAMPLES]))


def common_limit(prompts: int) -> int:
    """The number of prompts above which a gram is boilerplate: 2 % of them, at least 10 and at most 200."""
    return min(COMMON_MOST, max(COMMON_LEAST, int(COMMON_SHARE * prompts)))


def find_leakage(rows: Sequence[Mapping[str, Any]]) -> Leakage:
    """Exact and near-duplicates among prompts with the columns `prompt_id`, `set` and `messages`.

    The result does not depend on the order of the rows. Of several duplicates, the first by set and id is named; of
    several near-duplicates, the one with the greatest containment.
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


def _near(prompts: Sequence[_Prompt]) -> Iterator[Match]:
    """The best near-duplicate of every held-out prompt in each earlier role."""
    # A text that a role holds many times counts once, else its grams would look common.
    texts: dict[tuple[int, bytes], list[_Prompt]] = {}
    for prompt in prompts:
        texts.setdefault((prompt.role, prompt.digest), []).append(prompt)
    held_out = [group for group in texts.values() if group[0].role > 0]
    others = [*(group[0] for group in held_out), *(group[0] for group in texts.values() if group[0].role == 0)]
    numbers_of = lru_cache(maxsize=1024)(lambda place: numbers(others[place].text))
    for h, containments in enumerate(_containments(others, len(held_out))):
        by_role: dict[int, list[tuple[float, str, str, int]]] = {}
        for o, share in containments.items():
            if others[o].role < others[h].role:
                found = (-share, others[o].set, others[o].prompt_id, o)
                by_role.setdefault(others[o].role, []).append(found)
        for candidates in by_role.values():
            best = next((c for c in sorted(candidates) if numbers_of(h) <= numbers_of(c[3])), None)
            if best is not None:
                yield from (prompt.match(others[best[3]], -best[0]) for prompt in held_out[h])


def _containments(prompts: Sequence[_Prompt], held_out: int) -> Iterator[dict[int, float]]:
    """For each of the first `held_out` prompts: place of another prompt -> containment, if that is large enough."""
    grams_of, limit = _gram_reader(), common_limit(len(prompts))
    grams = [sorted(grams_of(prompt.text))[:MAX_GRAMS] for prompt in prompts[:held_out]]
    places: dict[int, list[int]] = {}  # where each gram of a held-out prompt stands; common ones stop at the limit
    for place, own in enumerate(grams):
        for gram in own:
            places.setdefault(gram, []).append(place)
    for place, prompt in enumerate(prompts[held_out:], start=held_out):
        for gram in grams_of(prompt.text):
            if len(places.get(gram, ())) <= limit and gram in places:
                places[gram].append(place)
    for place, own in enumerate(grams):
        rare = [gram for gram in own if len(places[gram]) <= limit]
        shared = Counter(other for gram in rare for other in places[gram])
        yield {other: n / len(rare) for other, n in shared.items() if other != place and n >= CONTAINMENT * len(rare)}


def _gram_reader() -> Callable[[str], set[int]]:
    """A function from a text to the hashes of its distinct grams. Words are numbered, so that runs repeat exactly."""
    known: dict[str, int] = {}

    def grams(text: str) -> set[int]:
        numbered = [known.setdefault(word, len(known)) for word in words(text)]
        if len(numbered) < SHORT:
            return {hash((-1, *numbered))} if numbered else set()
        return {hash(tuple(numbered[n : n + NGRAM])) for n in range(len(numbered) - NGRAM + 1)}

    return grams
