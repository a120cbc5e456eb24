"""Derive short worked solutions for MAWPS questions, which come with a bare number as the answer.

The solution is the one arithmetic expression, of one or two steps, over numbers in the question that gives
the answer. A row is skipped where there is none, or where two that mean different things both give it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import combinations, permutations
from pathlib import Path
from typing import NamedTuple

NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w)|(?<![\w.])\.\d+(?!\w)")
MAX_DECIMALS = 2
MAX_NUMBERS = 4  # in a question; more make chance hits likely


class Step(NamedTuple):
    """`left op right`; an operand is the place of a number in the question, or -1 for the step before."""

    left: int
    op: str
    right: int


def place(question: str) -> float:
    """A question's place in hash order, in [0, 1)."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big") / 2**32


def split_rows(path: Path, hash_range: tuple[float, float]) -> list[dict[str, str]]:
    """`question` and final `answer` of a JSONL file's rows in a part of hash order; a repeated question counts once."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = {row["question"]: row["answer"].rpartition("####")[2].strip().replace(",", "") for row in rows}
    low, high = hash_range
    return [{"question": q, "answer": answer} for q, answer in found.items() if low <= place(q) < high]


def apply(left: Fraction, op: str, right: Fraction) -> Fraction | None:
    if op == "+":
        return left + right
    if op == "-":
        return left - right
    if op == "*":
        return left * right
    return left / right if right else None


def written(number: Fraction) -> str | None:
    """A number as one would write it by hand; None if it is negative or has too many decimals."""
    scaled = number * 10**MAX_DECIMALS
    if number < 0 or scaled.denominator != 1:
        return None
    if number.denominator == 1:
        return str(number.numerator)
    return f"{float(number):.{MAX_DECIMALS}f}".rstrip("0")


def expressions(count: int, steps: int) -> Iterator[tuple[Step, ...]]:
    """All expressions of one or two steps over `count` numbers, each used once; the most natural come first."""
    sums = [Step(i, op, j) for i, j in combinations(range(count), 2) for op in "+*"]
    differences = [Step(i, op, j) for i, j in permutations(range(count), 2) for op in "-/"]
    for first in sorted(sums + differences, key=lambda step: (max(step.left, step.right), step.left > step.right)):
        if steps == 1:
            yield (first,)
            continue
        for other in set(range(count)) - {first.left, first.right}:
            yield from ((first, Step(-1, op, other)) for op in "+-*/")
            yield from ((first, Step(other, op, -1)) for op in "-/")


def values(expression: Iterable[Step], numbers: list[Fraction]) -> list[Fraction] | None:
    """The result of every step, or None after a division by zero."""
    results: list[Fraction] = []
    for step in expression:
        left, right = (results[-1] if place < 0 else numbers[place] for place in (step.left, step.right))
        result = apply(left, step.op, right)
        if result is None:
            return None
        results.append(result)
    return results


def solutions(numbers: list[Fraction], answer: Fraction, steps: int) -> list[tuple[Step, ...]]:
    """One expression for each meaning that gives the answer without a negative or an endless number on the way.

    Two expressions mean the same if they agree after the numbers are exchanged for other ones.
    """
    others = {number: Fraction(1009 + 97 * n * n, 7 + n) for n, number in enumerate(sorted(set(numbers)))}
    exchanged = [others[number] for number in numbers]
    found: dict[Fraction, tuple[Step, ...]] = {}
    for expression in expressions(len(numbers), steps):
        results = values(expression, numbers)
        if results is None or results[-1] != answer or None in map(written, results):
            continue
        found.setdefault(values(expression, exchanged)[-1], expression)
    return list(found.values())


def meant(numbers: list[Fraction], answer: Fraction) -> tuple[Step, ...] | None:
    """The expression that a question's numbers and answer call for; None if there is none or it is not clear which."""
    if len(numbers) > MAX_NUMBERS or None in map(written, [answer, *numbers]):
        return None
    one, two = solutions(numbers, answer, 1), solutions(numbers, answer, 2)
    if one and two and len(numbers) == 3:
        return None  # is the third number needed or a distraction?
    candidates = one or two
    return candidates[0] if len(candidates) == 1 else None


def worked(question: str, answer: str) -> str | None:
    """The worked solution, ending in `#### answer`; None if there is none or it is not clear which is meant."""
    numbers = [Fraction(text.replace(",", "")) for text in NUMBER.findall(question)]
    goal = Fraction(answer.replace(",", ""))
    expression = meant(numbers, goal)
    if expression is None:
        return None
    lines, before = [], None
    for step, result in zip(expression, values(expression, numbers), strict=True):
        left, right = (before if place < 0 else numbers[place] for place in (step.left, step.right))
        lines.append(f"{written(left)} {step.op} {written(right)} = {written(result)}")
        before = result
    return "\n".join([*lines, f"#### {written(goal)}"])
