"""How many held-out prompts the leakage guard reports on real and built-in data, and its cost (`research/leakage.md`).

python benchmarks/leakage.py GSM8K_FOLDER MAWPS_FOLDER    (train.jsonl, test.jsonl; addsub.jsonl, singleeq.jsonl, ...)
"""

from __future__ import annotations

import argparse
import difflib
import json
import random
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

from cropi.builtin import FAMILIES, generate
from cropi.prompt_text import numbers, prompt_text, words
from cropi.prompts import leakage
from cropi.prompts.leakage import find_leakage

Rows = list[dict[str, Any]]
SAME_WORDS = 0.85  # difflib's ratio above which two problems with the same numbers count as two editions of one


def problems(path: Path, set_name: str) -> Rows:
    """The questions of a JSONL file as rows of a prompt table."""
    texts = [json.loads(line)["question"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [row(text, set_name, f"{set_name} {path.stem} {n}") for n, text in enumerate(texts)]


def row(text: str, set_name: str, prompt_id: str) -> dict[str, Any]:
    return {"prompt_id": prompt_id, "set": set_name, "messages": json.dumps(text)}


def halves(path: Path) -> Rows:
    """Every second problem of a file held out."""
    return [r | {"set": "test/x"} if n % 2 else r for n, r in enumerate(problems(path, "train"))]


def built_in() -> Rows:
    drawn = (("train", "train", 50), ("validation/v", "validation", 24), ("test/t", "test", 64))
    return [
        row(problem["prompt"], set_name, problem["prompt_id"])
        for family in FAMILIES
        for set_name, split, count in drawn
        for problem in generate(family, split=split, count=count, seed=3)
    ]


def editions(rows: Rows) -> set[str]:
    """Held-out prompts that have a training prompt with the same numbers and nearly the same words in order."""
    train: dict[frozenset[tuple[str, int]], list[list[str]]] = {}
    for r in rows:
        if r["set"] == "train":
            text = prompt_text(r["messages"])
            train.setdefault(frozenset(numbers(text).items()), []).append(words(text))
    found = set()
    for r in rows:
        text = prompt_text(r["messages"])
        there = train.get(frozenset(numbers(text).items()), []) if r["set"] != "train" else []
        if any(difflib.SequenceMatcher(None, words(text), w, autojunk=False).ratio() >= SAME_WORDS for w in there):
            found.add(r["prompt_id"])
    return found


def mixtures(sentences: list[str], train: int, held_out: int) -> Rows:
    """Prompts of four sentences drawn at random."""
    rng = random.Random(0)
    sets = ["train"] * train + ["test/t"] * held_out
    return [row(". ".join(rng.sample(sentences, 4)), name, str(n)) for n, name in enumerate(sets)]


def measure(rows: Rows) -> str:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = find_leakage(rows)
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return (
        f"exact {len(found.exact)}, near {len(found.near)}; {seconds:.1f} s of one core, peak memory +{grown:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gsm8k", type=Path)
    parser.add_argument("mawps", type=Path)
    folders = parser.parse_args()
    gsm8k, mawps = folders.gsm8k, folders.mawps
    cases = {
        "built-in families": built_in(),
        "GSM8K test in train": problems(gsm8k / "train.jsonl", "train") + problems(gsm8k / "test.jsonl", "test/t"),
        "GSM8K train, halves": halves(gsm8k / "train.jsonl"),
        "MultiArith, halves": halves(mawps / "multiarith.jsonl"),
        "SingleEq in AddSub": problems(mawps / "addsub.jsonl", "train") + problems(mawps / "singleeq.jsonl", "test/t"),
        "SingleOp in SingleEq": problems(mawps / "singleeq.jsonl", "train")
        + problems(mawps / "singleop.jsonl", "test/t"),
    }
    texts = [prompt_text(r["messages"]) for r in cases["GSM8K test in train"]]
    sentences = [sentence for text in texts for sentence in text.split(". ")]
    for train, held_out in ((100_000, 2_000), (50_000, 50_000)):  # first: peak memory only grows
        print(f"{train} and {held_out} mixtures of GSM8K sentences: {measure(mixtures(sentences, train, held_out))}")
    for name, rows in cases.items():
        sizes = Counter("train" if r["set"] == "train" else "held out" for r in rows)
        print(f"{name} ({sizes['held out']} in {sizes['train']}): {measure(rows)}")
        if name.startswith("Single"):
            known = editions(rows)
            found = find_leakage(rows)
            reported = {match.prompt_id for match in (*found.exact, *found.near)}
            print(f"  editions by difflib {len(known)}, reported of them {len(known & reported)}")
    leakage.numbers = lambda text: Counter()
    for name, rows in cases.items():
        print(f"without the condition on numbers, {name}: {measure(rows)}")


if __name__ == "__main__":
    main()
