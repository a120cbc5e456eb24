"""The run's verifier as TRL's reward function, with a log of the training rewards that later stages read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cropi.parallel import process_group
from cropi.rewards.verifier import Answered, Judge
from cropi.streams import append_jsonl, cut_jsonl, read_jsonl


@dataclass(frozen=True)
class Judged:
    """Judged completions of a generation batch, in TRL's order."""

    prompt_ids: Sequence[str]
    completion_ids: Sequence[Sequence[int]]  # without padding
    rewards: Sequence[float | None]
    verdicts: Sequence[str]

    def rows(self, rows: Sequence[int]) -> Judged:
        """Some of the completions."""
        return Judged(*([column[row] for row in rows] for column in vars(self).values()))

    def groups(self, size: int) -> list[tuple[str, list[float]]]:
        """Prompt ids of whole groups, with the rewards of the completions that could be judged."""
        starts = range(0, len(self.prompt_ids), size)
        parts = ((self.prompt_ids[start], self.rewards[start : start + size]) for start in starts)
        return [(prompt_id, [value for value in part if value is not None]) for prompt_id, part in parts]


class RewardLog:
    """Writes one line per generation batch: step, prompt ids, rewards, verdicts, tokens.

    `tokens` counts the completions' tokens. Strategies and the cost ledger read the log. `latest` is the newest batch:
    of every process its own part; the first process writes the line for all.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.latest: Judged | None = None

    def record(self, judged: Judged, step: int, prompt_tokens: int | None = None) -> None:
        """Take this process's part of a generation batch. Collective."""
        line: dict[str, Any] = {
            "step": step,
            "prompt_ids": judged.prompt_ids,
            "rewards": judged.rewards,
            "verdicts": dict(sorted(Counter(judged.verdicts).items())),
            "tokens": sum(len(ids) for ids in judged.completion_ids),
        }
        if prompt_tokens is not None:
            line["prompt_tokens"] = prompt_tokens
        lines = process_group().gather(line)
        if process_group().is_main:
            append_jsonl(self._path, _joined(lines))
        self.latest = judged

    def forget_from(self, step: int) -> None:
        """Drop the lines at or after an optimiser step, which an interrupted attempt wrote after its checkpoint."""
        cut_jsonl(self._path, lambda row: row["step"] < step)


class RecordedReward(RewardLog):
    """Judges completions as a reward function, and keeps what it finds.

    The prompts' tokens are logged too if the rows have a column `prompt_tokens`.
    """

    __name__ = "verdict"

    def __init__(self, judge: Judge, path: Path) -> None:
        super().__init__(path)
        self._judge = judge

    def __call__(
        self, completions: list[Any], answer: list[str], prompt_id: list[str], completion_ids: list[Any], **columns: Any
    ) -> list[float | None]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        kept = ("source", "prompt_json", "extra")
        others = zip(*(columns.get(name, [""] * len(texts)) for name in kept), strict=True)
        rows = [Answered(text, gold, *rest) for text, gold, rest in zip(texts, answer, others, strict=True)]
        judgements = self._judge(rows)
        verdicts = [judgement.verdict for judgement in judgements]
        rewards = [judgement.reward for judgement in judgements]
        prompt_tokens = sum(columns["prompt_tokens"]) if "prompt_tokens" in columns else None
        judged = Judged(prompt_id, completion_ids, rewards, verdicts)
        self.record(judged, columns["trainer_state"].global_step, prompt_tokens)
        return rewards


def _joined(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the lines of all processes into the line of a generation batch."""
    line = dict(rows[0])
    for row in rows[1:]:
        line |= {name: [*line[name], *row[name]] for name in ("prompt_ids", "rewards")}
        line |= {name: line[name] + row[name] for name in ("tokens", "prompt_tokens") if name in line}
        line["verdicts"] = dict(sorted((Counter(line["verdicts"]) + Counter(row["verdicts"])).items()))
    return line


def newest_rewards(path: Path, before_step: int) -> dict[str, list[float]]:
    """Rewards of the newest group of every prompt that was trained on before a step.

    Completions that could not be judged do not count. A prompt whose completions never could has no rewards: its gold
    answer cannot be read.
    """
    found: dict[str, list[float]] = {}
    for row in read_jsonl(path):
        if row["step"] >= before_step:
            break
        group: dict[str, list[float]] = {prompt_id: [] for prompt_id in row["prompt_ids"]}
        for prompt_id, value in zip(row["prompt_ids"], row["rewards"], strict=True):
            if value is not None:
                group[prompt_id].append(value)
        found |= {prompt_id: rewards for prompt_id, rewards in group.items() if rewards or prompt_id not in found}
    return found
