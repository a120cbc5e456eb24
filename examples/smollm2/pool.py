"""Write the files of the recipe `gsm8k-smollm2`: a pool of word problems, some of use and most not, sources named.

Wanted are the two-step problems of MAWPS's multiarith. In the pool half of them carry the answer of another one
(`mislabelled`); beside them stand one-step problems (`one-step`), GSM8K's (`gsm8k`, too hard), and counting of
letters by reasoning-gym (`letters`, of no use). MAWPS is split by hash: 0-0.4 is left
for the warm start, then training, validation and test.
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

import reasoning_gym
from worked import split_rows

Row = dict[str, str]

WARM, TRAIN, VALIDATION = 0.4, 0.7, 0.8  # where the parts end in hash order


def named(source: str, rows: Iterable[Row]) -> list[Row]:
    return [{"question": row["question"], "answer": row["answer"], "source": source} for row in rows]


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


def letters(count: int, seed: int) -> list[Row]:
    """How often a letter occurs in a text."""
    return [
        {"question": item["question"], "answer": item["answer"]}
        for item in reasoning_gym.create_dataset("letter_counting", size=count, seed=seed)
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mawps", type=Path, required=True, help="folder of addsub, multiarith and singleop .jsonl")
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    parser.add_argument("--hard", type=int, default=160, help="GSM8K problems in the pool (default: 160)")
    parser.add_argument("--letters", type=int, default=80, help="letter-counting problems in the pool (default: 80)")
    parser.add_argument("--seed", type=int, default=0, help="of the wrong answers and the letters (default: 0)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    generator = random.Random(arguments.seed)

    def mawps(part: tuple[float, float], *names: str) -> list[Row]:
        return [row for name in names for row in split_rows(arguments.mawps / f"{name}.jsonl", part)]

    wanted = mawps((WARM, TRAIN), "multiarith")
    half = len(wanted) // 2
    files = {
        "train": [
            *named("multiarith", wanted[:half]),
            *named("mislabelled", mislabelled(wanted[half:], generator)),
            *named("one-step", mawps((WARM, TRAIN), "addsub", "singleop")),
            *named("gsm8k", split_rows(arguments.gsm8k / "train.jsonl", (0.0, 1.0))[: arguments.hard]),
            *named("letters", letters(arguments.letters, arguments.seed)),
        ],
        "validation": named("multiarith", mawps((TRAIN, VALIDATION), "multiarith")),
        "test-multiarith": named("multiarith", mawps((VALIDATION, 1.0), "multiarith")),
        "test-one-step": named("one-step", mawps((VALIDATION, 1.0), "addsub", "singleop")),
        "test-gsm8k": named("gsm8k", split_rows(arguments.gsm8k / "test.jsonl", (0.0, 1.0))),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (arguments.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
        counts = {
            source: sum(row["source"] == source for row in rows)
            for source in dict.fromkeys(row["source"] for row in rows)
        }
        print(f"{name}.jsonl: {counts}")


if __name__ == "__main__":
    main()
