"""What an arm's training has seen, read back from the record of its rewards."""

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
