"""The rewards of training so far, read back from the record."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from cropi.artifacts import read_jsonl
from cropi.reward_statistics import Visit, visit


def training_history(path: Path, before_step: int) -> list[Visit]:
    """Every prompt in every generation batch before a step.

    In the order of the batches, and by id within one. A prompt that a batch holds twice is one entry; completions that
    could not be judged do not count, and a prompt without any that could is left out.
    """
    found = []
    for row in read_jsonl(path):
        if row["step"] >= before_step:
            break
        values: dict[str, list[float]] = {}
        for prompt_id, value in zip(row["prompt_ids"], row["rewards"], strict=True):
            if value is not None:
                values.setdefault(prompt_id, []).append(value)
        found += [visit(row["step"], prompt_id, rewards) for prompt_id, rewards in sorted(values.items())]
    return found


def never_judged(path: Path, before_step: int) -> set[str]:
    """Prompts that were trained on before a step and never had a reward: their gold answer cannot be read."""
    rows = [row for row in read_jsonl(path) if row["step"] < before_step]
    pairs = [pair for row in rows for pair in zip(row["prompt_ids"], row["rewards"], strict=True)]
    return {i for i, _ in pairs} - {i for i, value in pairs if value is not None}


def newest_variances(history: Iterable[Visit], since_steps: Mapping[str, int] | None = None) -> dict[str, float]:
    """Variance of the newest training rewards of every prompt of a history.

    A prompt in `since_steps` counts only if it was trained on at or after its step there: it has other, newer rewards.
    """
    since_steps = since_steps or {}
    return {one.prompt_id: one.variance for one in history if one.step >= since_steps.get(one.prompt_id, 0)}
