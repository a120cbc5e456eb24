"""Plain answers per second: the pool of processes beside math-verify called directly in this one.

    python benchmarks/verifiers.py
    python benchmarks/verifiers.py --rows 4000 --rounds 7

Both judge the same answers, in turns: numbers, fractions, roots, polynomials and sets in a box, half of them wrong, no
two alike, so that nothing is remembered. The pool has one process, so that the ratio is what judging elsewhere costs;
what several processes gain comes on top. Directly means the library's `parse` and `verify`, without its time limits.
Prints the median ratio of rows per second, pool over directly, with the lowest and highest of the rounds.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time

from cropi.config import VerificationConfig
from cropi.rewards.pool import Pool
from cropi.rewards.verifier import CORRECT, Answered
from cropi.rewards.verifiers.math_answer import MathVerifier

KINDS = (
    ("{n}", "{n}"),
    ("\\frac{{{n}}}{{7}}", "{n}/7"),
    ("{n}\\sqrt{{2}}", "\\frac{{{m}}}{{\\sqrt{{2}}}}"),
    ("x^2+{n}x", "x(x+{n})"),
    ("\\{{1,{n}\\}}", "\\{{{n},1\\}}"),
    ("{n}.5", "\\frac{{{odd}}}{{2}}"),
)


def answers(start: int, count: int) -> list[Answered]:
    """Every second one is right."""
    found = []
    for number in range(start, start + count):
        gold, given = KINDS[number % len(KINDS)]
        n = number + 10
        shown = n if number % 2 else n + 1
        written = given.format(n=shown, m=2 * shown, odd=2 * shown + 1)
        found.append(Answered(f"We compute. So the answer is \\boxed{{{written}}}.", f"${gold.format(n=n)}$"))
    return found


def directly(rows: list[Answered]) -> list[bool]:
    from math_verify import parse, verify

    return [
        verify(
            parse(row.answer, parsing_timeout=None), parse(row.completion, parsing_timeout=None), timeout_seconds=None
        )
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1200, help="answers per round and side")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    ratios = []
    with Pool(MathVerifier(type="math"), VerificationConfig(processes=1)) as pool:
        pool(answers(0, 60))
        directly(answers(0, 60))
        for number in range(arguments.rounds):
            rows = answers(1000 + number * arguments.rows, arguments.rows)
            seconds = {}
            order = ("pool", "directly") if number % 2 else ("directly", "pool")
            for side in order:
                start = time.perf_counter()
                if side == "pool":
                    right = [judgement.verdict == CORRECT for judgement in pool(rows)]
                else:
                    peer = directly(rows)
                seconds[side] = time.perf_counter() - start
            agree = sum(a == b for a, b in zip(right, peer, strict=True)) / len(rows)
            ratios.append(seconds["directly"] / seconds["pool"])
            print(f"round {number}: pool {ratios[-1]:.2f} times the rows per second; verdicts agree on {agree:.1%}")
    print(f"median {statistics.median(ratios):.2f} (lowest {min(ratios):.2f}, highest {max(ratios):.2f})")


if __name__ == "__main__":
    main()
