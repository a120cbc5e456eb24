"""Cheap answers: does one that needs no thought earn more than chance? A policy would learn to give it."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from cropi.config import Verifier
from cropi.rewards.adapters import question
from cropi.rewards.verdicts import Judge, answered
from cropi.rewards.verifiers import written_gold

CONSTANTS = ("", "nan", "inf", "0", "1", "True", "answer", "[]", "{}")
CHOICES = 10  # gold answers that are given at once, at the most
PER_SOURCE = 100  # rows that each answer is tried on, at the most
UNLIKELY = 0.001  # an answer that earned so much by chance less often is reported


def cheap_answers(verifier: Verifier, judge: Judge, prompts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answers that earn more than chance, by source: what, the mean reward, that of chance, and of how many rows.

    Chance is the share of the commonest gold answer: more cannot be had without a look at the question. An answer is
    reported if a binomial variable of that mean reaches its sum of rewards, rounded down, less often than `UNLIKELY`.
    """
    by_source: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in prompts:
        by_source[row["source"]].append(row)
    found = []
    for source, every in sorted(by_source.items()):
        rows = every[:: -(-len(every) // PER_SOURCE)]
        tried = _completions(verifier, rows)
        asked = [answered(text, row) for texts in tried.values() for text, row in zip(texts, rows, strict=True)]
        rewards = [judgement.reward for judgement in judge(asked)]
        chance = Counter(row["answer"].strip() for row in rows).most_common(1)[0][1] / len(rows)
        for number, name in enumerate(tried):
            own = [one for one in rewards[number * len(rows) : (number + 1) * len(rows)] if one is not None]
            if own and at_least(math.floor(sum(own) + 1e-9), len(own), chance) < UNLIKELY:
                mean = sum(own) / len(own)
                found.append({"source": source, "answer": name, "earns": mean, "chance": chance, "rows": len(own)})
    return found


def _completions(verifier: Verifier, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Name of a cheap answer -> a completion with it for each row, written as the verifier wants answers."""
    golds = [gold for gold, _ in Counter(row["answer"].strip() for row in rows).most_common(CHOICES)]
    asked = [question(row["messages"]) for row in rows]
    numbers = [re.findall(r"-?\d+(?:\.\d+)?", text)[-1:] for text in asked]
    constants = {repr(text): [text] * len(rows) for text in CONSTANTS}
    constants["the commonest gold answer"] = golds[:1] * len(rows)
    constants["gold answers of others, all at once"] = [", ".join(golds)] * len(rows)
    constants["the prompt's last number"] = [number[0] if number else "0" for number in numbers]
    return {
        **{name: [written_gold(verifier, text) for text in texts] for name, texts in constants.items()},
        "no text at all": [""] * len(rows),
        "the prompt": asked,
    }


def at_least(count: int, of: int, chance: float) -> float:
    """The probability that a binomial variable is at least `count`."""
    return sum(math.comb(of, n) * chance**n * (1 - chance) ** (of - n) for n in range(count, of + 1))
