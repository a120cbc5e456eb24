"""Cheap answers are found where a verifier pays for them, and only there."""

from __future__ import annotations

import json
from collections import defaultdict
from fractions import Fraction
from itertools import product
from math import prod
from typing import Any

import pytest

from cropi.config import VerificationConfig
from cropi.rewards.pool import judge_of
from cropi.rewards.reward_audit import at_least, cheap_answers
from cropi.rewards.verifiers.exact_text import ExactVerifier
from cropi.rewards.verifiers.python_function import FunctionVerifier
from cropi.rewards.verifiers.reasoning_gym import ReasoningGymVerifier

LIMITS = VerificationConfig(seconds=5.0, memory_mb=1024)


def prompts(source: str, golds: list[str]) -> list[dict[str, Any]]:
    return [
        {"prompt_id": str(n), "source": source, "messages": json.dumps(f"so {n} plus {n}"), "answer": gold}
        for n, gold in enumerate(golds)
    ]


def cheap(verifier: Any, rows: list[dict[str, Any]]) -> dict[str, set[str]]:
    found = defaultdict(set)
    for row in cheap_answers(verifier, judge_of(verifier, LIMITS), rows):
        found[row["source"]].add(row["answer"])
    return dict(found)


CONSTANTS = {"''", "'nan'", "'inf'", "'0'", "'1'", "'True'", "'answer'", "'[]'", "'{}'"}
GOLD = {"the commonest gold answer", "gold answers of others, all at once"}


@pytest.mark.parametrize(
    ("source", "golds", "expected"),
    [
        ("holds", [str(n % 5) for n in range(60)], {"gold answers of others, all at once", "the prompt"}),
        ("holds", [f"x{n}" for n in range(60)], {"gold answers of others, all at once"}),
        ("starts", [f"0.{n}" for n in range(60)], {"''", "'0'", "no text at all"}),
        ("looks away", [str(n % 5) for n in range(60)], CONSTANTS - {"''"} | GOLD | {"the prompt"}),
        ("measures", [str(n) for n in range(60)], {"'nan'"}),
        ("reads the prompt", [str(n) for n in range(60)], {"the prompt's last number"}),
        ("equal", [("True", "False")[n % 2] for n in range(60)], set()),
        ("equal", [str(n % 3) for n in range(60)], set()),
        ("equal", ["1"] * 60, set()),
        ("equal", [str(n) for n in range(60)], {"the prompt's last number"}),
    ],
)
def test_what_earns_more_than_chance(source: str, golds: list[str], expected: set[str]) -> None:
    verifier = FunctionVerifier(type="function", path="tests.rewards.functions.lenient")
    found = cheap(verifier, prompts(source, golds))
    assert found.get(source, set()) - {"the prompt's last number"} == expected - {"the prompt's last number"}
    assert expected <= found.get(source, set())


def test_grades_count_as_they_are_and_sources_stand_apart() -> None:
    verifier = FunctionVerifier(type="function", path="tests.rewards.functions.lenient", graded=True)
    rows = prompts("partly", [str(n + 100) for n in range(50)]) + prompts("equal", [f"x{n}" for n in range(50)])
    (row,) = cheap_answers(verifier, judge_of(verifier, LIMITS), rows)
    assert row == {"source": "partly", "answer": "'0'", "earns": pytest.approx(0.6), "chance": 0.02, "rows": 50}


def test_answers_are_written_as_the_verifier_wants_them_and_a_strict_one_pays_for_none() -> None:
    assert cheap(ExactVerifier(type="exact", marker="answer:"), prompts("sums", [f"x{n}" for n in range(40)])) == {}
    marked = ExactVerifier(type="exact", marker="answer:")
    assert cheap(marked, prompts("sums", [str(n) for n in range(40)])) == {"sums": {"the prompt's last number"}}


@pytest.mark.parametrize(("count", "of", "chance"), [(0, 4, 0.3), (2, 5, 0.25), (5, 5, 0.5), (3, 6, 1.0), (1, 3, 0.0)])
def test_the_binomial_tail_by_counting(count: int, of: int, chance: float) -> None:
    p = Fraction(chance)
    draws = (draw for draw in product((0, 1), repeat=of) if sum(draw) >= count)
    exact = sum(prod(p if one else 1 - p for one in draw) for draw in draws)
    assert at_least(count, of, chance) == pytest.approx(float(exact), abs=1e-12)


# One of a few numbers is asked for, and a sequence may repeat itself: no fault of the verdicts.
EARNED = {"number_format": {"the prompt's last number"}, "number_sequence": {"the prompt's last number"}}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(1800)
def test_no_task_of_reasoning_gym_pays_for_a_cheap_answer() -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    rows = []
    for task in sorted(set(DATASETS) - {"composite"}):
        for entry in reasoning_gym.create_dataset(task, size=40, seed=11):
            row = {"prompt_id": "a", "source": task, "messages": json.dumps(entry["question"])}
            rows.append(row | {"answer": str(entry["answer"]), "extra": json.dumps(entry["metadata"], default=str)})
    assert cheap(ReasoningGymVerifier(type="reasoning_gym"), rows) == EARNED
