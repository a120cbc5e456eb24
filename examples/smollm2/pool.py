"""Write warm-start solutions and three pools of problems, from MAWPS, GSM8K and reasoning-gym.

The target skill is the two-step problem of MAWPS's multiarith. Each pool is a folder with a `train.jsonl`:

- `niche`: a tenth is relevant; the rest is easier (one-step), harder (GSM8K) or irrelevant (letters, divisors);
- `mislabelled`: the same problems, and half of the relevant ones carry the answer of another;
- `homogeneous`: relevant problems alone.

MAWPS consists of templates: 580 two-step problems are some 120 texts with other names and numbers. It is split by
template, in hash order, into warm start, training, validation and test. A problem that is still near one of a later
part is removed and counted. A problem whose solution `worked.py` can tell stands in several versions, with other
numbers of as many digits and the answer worked out anew.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

import reasoning_gym
from worked import NUMBER, Step, meant, place, split_rows, values, worked

Row = dict[str, str]

PARTS = {"warm": (0.0, 0.3), "train": (0.3, 0.55), "validation": (0.55, 0.65), "test": (0.65, 1.0)}
TWO_STEP, ONE_STEP = ("multiarith",), ("addsub", "singleop")
NEAR = 0.6  # Jaccard similarity of word pairs from which two problems count as the same
RELEVANT, EASIER, HARDER, IRRELEVANT = 320, 960, 960, 480  # problems in a pool; IRRELEVANT of each kind
VALIDATION, TARGETED, UNTARGETED = 64, 320, 80  # held-out problems; UNTARGETED of each kind
TRIES = 500  # to find other numbers for a problem


def named(source: str, rows: Iterable[Row], count: int) -> list[Row]:
    """The first `count` rows with the name of their kind."""
    found = [{"question": row["question"], "answer": row["answer"], "source": source} for row in islice(rows, count)]
    if len(found) < count:
        raise SystemExit(f"{source}: {count} problems asked for, {len(found)} found")
    return found


def expression_of(row: Row) -> tuple[Step, ...] | None:
    """The steps from a problem's numbers to its answer; None where that is not clear or the numbers are not whole."""
    numbers = NUMBER.findall(row["question"])
    if not all(number.isdigit() for number in numbers):
        return None
    return meant([Fraction(number) for number in numbers], Fraction(row["answer"]))


def renumbered(row: Row, expression: tuple[Step, ...], generator: random.Random) -> Row | None:
    """The problem with other numbers of as many digits, whole and above 0 on the way; None where none were found."""
    lengths = [len(number) for number in NUMBER.findall(row["question"])]
    for _ in range(TRIES):
        numbers = [Fraction(generator.randint(max(2, 10 ** (n - 1)), 10**n - 1)) for n in lengths]
        results = values(expression, numbers)
        if results is not None and all(result > 0 and result.denominator == 1 for result in results):
            texts = NUMBER.split(row["question"])
            question = texts[0] + "".join(f"{n}{text}" for n, text in zip(numbers, texts[1:], strict=True))
            return {"question": question, "answer": str(results[-1])}
    return None


def versions(rows: list[Row], count: int, generator: random.Random) -> list[Row]:
    """Every row, then up to `count` - 1 more versions of each row whose solution is known, round by round."""
    found = {row["question"]: row for row in rows}
    known = [(row, expression) for row in rows if (expression := expression_of(row))]
    for _ in range(count - 1):
        for row, expression in known:
            new = renumbered(row, expression, generator)
            if new is not None:
                found.setdefault(new["question"], new)
    return list(found.values())


def mislabelled(rows: list[Row], generator: random.Random) -> list[Row]:
    """Every row with the answer of another one that has another answer."""
    return [
        row
        | {
            "answer": generator.choice(
                [other["answer"] for other in rows if float(other["answer"]) != float(row["answer"])]
            )
        }
        for row in rows
    ]


def word_pairs(question: str) -> frozenset[tuple[str, str]]:
    """Pairs of neighbouring words, lower case, every number written 0."""
    words = re.findall(r"[a-z']+|0", re.sub(r"\d[\d,.]*", "0", question.lower()))
    return frozenset(pairwise(words))


def without_near_duplicates(rows: list[Row], kept: list[Row]) -> list[Row]:
    """The rows whose word pairs are less than `NEAR` similar to those of every row of `kept`."""
    others = [word_pairs(row["question"]) for row in kept]

    def near(own: frozenset[tuple[str, str]]) -> bool:
        return any(len(own & other) >= NEAR * len(own | other) for other in others)

    return [row for row in rows if not near(word_pairs(row["question"]))]


def templates(rows: list[Row]) -> list[list[Row]]:
    """Group rows that are near-duplicates of a group's first row."""
    found: list[tuple[frozenset[tuple[str, str]], list[Row]]] = []
    for row in rows:
        own = word_pairs(row["question"])
        group = next((rows for first, rows in found if len(own & first) >= NEAR * len(own | first)), None)
        if group is None:
            found.append((own, [row]))
        else:
            group.append(row)
    return [group for _, group in found]


def split(folder: Path, names: Iterable[str]) -> dict[str, list[Row]]:
    """MAWPS files split by template, without what is still near a later part."""
    rows = [row for name in names for row in split_rows(folder / f"{name}.jsonl", (0.0, 1.0))]
    groups = templates(rows)
    parts: dict[str, list[Row]] = {}
    removed: dict[str, int] = {}
    later: list[Row] = []
    for part in reversed(PARTS):
        low, high = PARTS[part]
        own = [row for group in groups if low <= place(group[0]["question"]) < high for row in group]
        parts[part] = without_near_duplicates(own, later)
        removed[part] = len(own) - len(parts[part])
        later += parts[part]
    print(f"{', '.join(names)}: {len(rows)} problems in {len(groups)} templates, near-duplicates removed: {removed}")
    return parts


def puzzles(task: str, count: int, seed: int, **settings: int) -> list[Row]:
    """Problems of reasoning-gym, each question once."""
    items = reasoning_gym.create_dataset(task, size=4 * count, seed=seed, **settings)
    rows = {item["question"]: {"question": item["question"], "answer": item["answer"]} for item in items}
    return list(rows.values())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mawps", type=Path, required=True, help="folder of addsub, multiarith and singleop .jsonl")
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    parser.add_argument("--seed", type=int, default=0, help="of numbers, wrong answers and puzzles (default: 0)")
    return parser.parse_args()


def warm_start(rows: list[Row]) -> list[Row]:
    """Worked solutions of the problems whose solution is clear."""
    solved = ((row, worked(row["question"], row["answer"])) for row in rows)
    return [
        {"question": row["question"], "answer": solution, "source": "worked"} for row, solution in solved if solution
    ]


def main() -> None:
    arguments = parse_arguments()
    generator = random.Random(arguments.seed)
    two_step, one_step = split(arguments.mawps, TWO_STEP), split(arguments.mawps, ONE_STEP)
    letters = puzzles("letter_counting", IRRELEVANT + UNTARGETED, arguments.seed)
    divisors = puzzles("gcd", IRRELEVANT + UNTARGETED, arguments.seed, max_value=60)
    hard = without_near_duplicates(
        list(islice(split_rows(arguments.gsm8k / "train.jsonl", (0.0, 1.0)), HARDER + 40)),
        tested := split_rows(arguments.gsm8k / "test.jsonl", (0.0, 1.0))[:UNTARGETED],
    )

    def relevant(part: str, count: int, of_each: int) -> list[Row]:
        return named("two-step", versions(two_step[part], of_each, generator), count)

    target = relevant("train", RELEVANT, 8)
    others = [
        *named("one-step", versions(one_step["train"], 8, generator), EASIER),
        *named("gsm8k", hard, HARDER),
        *named("letters", letters, IRRELEVANT),
        *named("divisors", divisors, IRRELEVANT),
    ]
    wrong = set(generator.sample(range(RELEVANT), RELEVANT // 2))
    wrongly = [row | {"source": "mislabelled"} for row in mislabelled(target, generator)]
    files = {
        "warm": warm_start(versions([*two_step["warm"], *one_step["warm"]], 3, generator)),
        "niche/train": [*target, *others],
        "mislabelled/train": [*(wrongly[n] if n in wrong else row for n, row in enumerate(target)), *others],
        "homogeneous/train": target,
        "validation": relevant("validation", VALIDATION, 4),
        "test-targeted": relevant("test", TARGETED, 2),
        "test-untargeted": [
            *named("one-step", one_step["test"], UNTARGETED),
            *named("gsm8k", tested, UNTARGETED),
            *named("letters", letters[IRRELEVANT:], UNTARGETED),
            *named("divisors", divisors[IRRELEVANT:], UNTARGETED),
        ],
    }
    for name, rows in files.items():
        path = arguments.output / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{name}.jsonl: {dict(Counter(row['source'] for row in rows))}")


if __name__ == "__main__":
    main()
