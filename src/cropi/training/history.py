"""What an arm's training has seen, read back from the record of its rewards."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from cropi.artifacts import read_jsonl


def training_history(path: Path, before_step: int) -> list[tuple[int, str, float, int]]:
    """(step, prompt id, mean reward, number of rewards) of every prompt in every generation batch before a step.

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
        found += [(row["step"], i, sum(rewards) / len(rewards), len(rewards)) for i, rewards in sorted(values.items())]
    return found


def newest_rates(
    history: Iterable[tuple[int, str, float, int]], since_steps: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Newest mean training reward of every prompt of a history.

    A prompt in `since_steps` counts only if it was trained on at or after its step there: it has other, newer rewards.
    """
    since_steps = since_steps or {}
    return {prompt_id: mean for step, prompt_id, mean, _ in history if step >= since_steps.get(prompt_id, 0)}
