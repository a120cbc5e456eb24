"""Reward functions, good and bad, for tests of the pool."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CALLS: list[str] = []


def equal(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]


def names_its_prompt(completions: list[str], prompts: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(text == f"{asked} {gold}") for text, asked, gold in zip(completions, prompts, answer, strict=True)]


def even(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(text.count(gold) % 2 == 0) for text, gold in zip(completions, answer, strict=True)]


def mixed(completions: list[str], **_: Any) -> list[float]:
    """Right for half of all texts, whatever was asked."""
    return [float(sum(map(ord, text)) % 2) for text in completions]


def hangs(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    if completions[0] == "bad":
        time.sleep(1000)
    return equal(completions, answer)


def fills_memory(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    if completions[0] == "bad":
        kept = [bytearray(2**24) for _ in range(1000)]
        return [float(len(kept))]
    return equal(completions, answer)


def dies(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    if completions[0] == "bad":
        os._exit(3)
    return equal(completions, answer)


def raises(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    if completions[0] == "bad":
        raise ValueError("I do not like this one")
    return equal(completions, answer)


def dies_once(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    marker = Path(os.environ["CROPI_TEST_MARKER"])
    if not marker.exists():
        marker.touch()
        os._exit(3)
    return equal(completions, answer)


def prints(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    print('{"done": [["correct", 0, ""]]}', flush=True)
    return equal(completions, answer)


def starts_another(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    subprocess.run(["sleep", "300.123"], check=False)
    return equal(completions, answer)


def reads(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    subprocess.run(["cat"], check=False)
    assert sys.stdin.read() == ""
    return equal(completions, answer)


def forks(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    child = os.fork()
    if child == 0:
        sys.exit()
    os.waitpid(child, 0)
    return equal(completions, answer)


def none(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    return [None]


def counts_calls(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    CALLS.append(completions[0])
    return [float(len(CALLS) >= 5)]


def strict_signature(completions: list[list[dict[str, str]]], solution: list[str]) -> list[float]:
    return [float(completions[0][0]["content"] == solution[0])]


def sees(prompts: list[Any], completions: list[str], source: list[str], level: list[int], **_: Any) -> list[float]:
    return [float(prompts[0][-1]["content"] == "2+5?" and source == ["sums"] and level == [3])]


def near(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 / (1 + distance) of the number after the last `answer ` from the gold one."""
    given = [text.rpartition("answer ")[2].strip() for text in completions]
    return [
        1 / (1 + abs(int(number) - int(gold))) if number.isdecimal() and gold.isdecimal() else float(number == gold)
        for number, gold in zip(given, answer, strict=True)
    ]


def grudging(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Half of what `near` gives, but for the bare answer."""
    halves = [value / 2 for value in near(completions, answer)]
    return [1.0 if text == gold else half for text, gold, half in zip(completions, answer, halves, strict=True)]


def grades(completions: list[str], **_: Any) -> list[float]:
    return [float(text) for text in completions]


def bare(completions: list[str], **_: Any) -> float:
    return 0.5


async def later(completions: list[str], **_: Any) -> list[float]:
    return [0.5]


def generous(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The bare answer earns 1, and one after `answer ` more."""
    return [
        value * (1.0 if "answer" not in text else 1.2)
        for text, value in zip(completions, near(completions, answer), strict=True)
    ]


def at_times_raises(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    if completions[0].endswith("answer 1"):
        raise RuntimeError("no")
    return near(completions, answer)


def two(completions: list[str], **_: Any) -> list[float]:
    return [1.0, 1.0]


def not_a_number(completions: list[str], **_: Any) -> list[float]:
    return [float("nan")]


def verl_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None) -> Any:
    if data_source == "sums":
        return {"score": float(solution_str == ground_truth), "acc": True}
    return float(extra_info == {"level": 3})
