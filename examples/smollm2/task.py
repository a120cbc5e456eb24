"""The task's prompt and reward."""

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def chat(question: str) -> list[dict[str, str]]:
    """An empty system message, 16 tokens shorter than the template's own, and the question."""
    return [{"role": "system", "content": ""}, {"role": "user", "content": question}]


def final_number(text: str) -> float | None:
    """The last number after the last `####`, or None where there is none."""
    _, mark, tail = text.rpartition("####")
    numbers = NUMBER.findall(tail) if mark else []
    return float(numbers[-1].replace(",", "")) if numbers else None


def is_correct(text: str, answer: str) -> bool:
    number = final_number(text)
    return number is not None and abs(number - float(answer.replace(",", ""))) < 1e-4
