"""Rows of procedural problems: seeded, split by content, optionally mislabelled."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import replace
from typing import Any

from cropi.builtin.families import FAMILIES, Difficulty, Problem, difficulty, draw, early_answer, guess

SPLITS = ("train", "validation", "test")
LABEL_RULES = ("right", "stop_early")
# So many draws in a row without a new problem, and the space counts as used up.
PATIENCE = 5_000
DISTRACTING_FAMILIES = 3  # in one prompt


def generate(
    family: str,
    *,
    split: str,
    count: int,
    seed: int,
    level: Difficulty | None = None,
    label_noise: float = 0.0,
    label_rule: str = "right",
    distractors: int = 0,
) -> list[dict[str, Any]]:
    """`count` distinct problems of one family as rows; the same arguments give the same rows in any process.

    Without a `level` they have the family's default difficulty.
    A problem belongs to the split that the hash of its prompt says (80 % train, 10 % validation, 10 % test), so
    splits are disjoint whatever the seeds. Exactly ``round(label_noise * count)`` rows, chosen by the seed, carry a
    wrong but plausible answer. With the label rule ``stop_early`` every row carries the answer of one who stops one
    item early, right or wrong. The level's `hint` puts the first ``ceil(hint * words)`` words of the worked steps at
    the end of the prompt, style first; at 1 only ``answer X`` is left to say. `distractors` are so many words behind
    the family's name that say nothing (see `distracted`). The split is that of the problem without either.

    Returns rows with the keys `prompt_id` (16 hex digits from family and prompt), `prompt`, `answer`, `source` (the
    family) and `mislabelled` (whether the answer is wrong).
    Raises ValueError for an argument out of range, for ``stop_early`` with label noise or a family without running
    states, or when there are fewer distinct problems than `count`.
    """
    _check(split, count, label_noise, label_rule)
    if distractors < 0:
        raise ValueError(f"distractors is {distractors}; it must be at least 0")
    level = level or difficulty(family)
    rng = random.Random(f"{family}/{split}/{seed}")
    problems = _distinct(family, split, count, rng, level)
    noisy = set(rng.sample(range(count), round(label_noise * count)))
    words = random.Random(f"{family}/{split}/{seed}/distractors")
    rows = []
    for i, problem in enumerate(problems):
        shown = distracted(hinted(problem, level.hint), distractors, words)
        answer = early_answer(problem) if label_rule == "stop_early" else problem.answer
        if i in noisy:
            while (answer := guess(problem, rng, level)) == problem.answer:
                pass
        rows.append(
            {
                "prompt_id": prompt_id(shown),
                "prompt": shown.prompt,
                "answer": answer,
                "source": family,
                "mislabelled": answer != problem.answer,
            }
        )
    return rows


def prompt_id(problem: Problem) -> str:
    """Content hash of family and prompt: the first 16 hex digits of SHA-256."""
    return hashlib.sha256(f"{problem.family}\n{problem.prompt}".encode()).hexdigest()[:16]


def split_of(problem: Problem) -> str:
    """The split a problem belongs to: 80 % train, 10 % validation, 10 % test, by content hash."""
    return SPLITS[max(0, int(prompt_id(problem), 16) % 10 - 7)]


def hinted(problem: Problem, hint: float) -> Problem:
    """The problem with a share of its worked steps, rounded up to a word, at the end of the prompt."""
    words = problem.steps.partition(" answer ")[0].split()
    return replace(problem, prompt=" ".join([problem.prompt, *words[: math.ceil(hint * len(words))]]))


def distracted(problem: Problem, count: int, rng: random.Random) -> Problem:
    """The problem with `count` words behind its family's name: names of three other families, joined by hyphens.

    The built-in policy reads them as one unknown word and works on nearly as before. For similarity of texts they
    outweigh all other words, so that it no longer tells families apart.
    """
    if not count:
        return problem
    family, _, rest = problem.prompt.partition(" ")
    names = rng.sample([name for name in FAMILIES if name != family], DISTRACTING_FAMILIES)
    return replace(problem, prompt=f"{family} {'-'.join(rng.choices(names, k=count))} {rest}")


def _check(split: str, count: int, label_noise: float, label_rule: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    if not 0.0 <= label_noise <= 1.0:
        raise ValueError(f"label_noise is {label_noise}; it is a share, from 0 to 1")
    if label_rule not in LABEL_RULES:
        raise ValueError(f"unknown label_rule {label_rule!r}; known: {', '.join(LABEL_RULES)}")
    if label_rule != "right" and label_noise:
        raise ValueError(f"label_noise is {label_noise} beside label_rule {label_rule!r}; give one of them")


def _distinct(family: str, split: str, count: int, rng: random.Random, level: Difficulty) -> list[Problem]:
    found: dict[str, Problem] = {}
    misses = 0
    while len(found) < count:
        problem = draw(family, rng, level)
        if problem.prompt not in found and split_of(problem) == split:
            found[problem.prompt] = problem
            misses = 0
        elif (misses := misses + 1) == PATIENCE:
            raise ValueError(
                f"asked for {count} distinct {family!r} problems in split {split!r} but found only {len(found)} "
                f"with length {level.min_length} to {level.max_length}; ask for fewer, or raise max_length"
            )
    return list(found.values())
