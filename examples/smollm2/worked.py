"""Derive short worked solutions for MAWPS questions, which come with a bare number as the answer.

The solution is the one arithmetic expression, of one or two steps, over numbers in the question that gives
the answer. A row is skipped where there is none, or where two that mean different things both give it.
Rows are read and split by cropi's own reader (`cropi.prompts._from_rows`, private: this file goes with the
cropi it is shipped with), so a recipe with another `hash_range` of the same files never sees these rows.
"""

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import combinations, permutations
from pathlib import Path
from typing import NamedTuple

from cropi.config import FileSource
from cropi.prompts import _from_rows

NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w)|(?<![\w.])\.\d+(?!\w)")
MAX_DECIMALS = 2
MAX_NUMBERS = 4  # in a question; more make chance hits likely


class Step(NamedTuple):
    """`left op right`; an operand is the place of a number in the question, or -1 for the step before."""

    left: int
    op: str
    right: int


def split_rows(path: Path, hash_range: tuple[float, float]) -> list[dict[str, str]]:
    """`question` and `answer` of the rows that cropi reads from a file under this `hash_range`."""
    source = FileSource(type="file", path=str(path), hash_range=hash_range)
    return [
        {"question": json.loads(row["messages"]), "answer": row["answer"]} for row, _ in _from_rows(source, path.name)
    ]


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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="MAWPS files: `question`, numeric `answer`")
    parser.add_argument("--output", type=Path, required=True, help="JSONL of `question` and worked `answer`")
    parser.add_argument(
        "--hash-range", type=float, nargs=2, default=(0.0, 0.4), metavar=("LOW", "HIGH"), help="default: 0.0 0.4"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    derived = []
    for path in arguments.data:
        rows = split_rows(path, tuple(arguments.hash_range))
        solved = [(row, solution) for row in rows if (solution := worked(row["question"], row["answer"]))]
        derived += [{"question": row["question"], "answer": solution} for row, solution in solved]
        two_steps = sum(solution.count("\n") == 2 for _, solution in solved)
        print(f"{path.name}: {len(solved)} derived ({two_steps} of two steps), {len(rows) - len(solved)} skipped")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in derived]
    arguments.output.write_text("".join(lines), encoding="utf-8")
    print(f"{len(derived)} rows written to {arguments.output}")


if __name__ == "__main__":
    main()
