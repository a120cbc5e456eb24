"""The run's verifier as TRL's reward function, and a record of the rewards that training saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cropi.parallel import process_group
from cropi.rewards.verdicts import Answered, Judge
from cropi.streams import append_jsonl, cut_jsonl


@dataclass(frozen=True)
class Judged:
    """The completions of a generation batch as they were judged, in TRL's order."""

    prompt_ids: Sequence[str]
    texts: Sequence[str]
    completion_ids: Sequence[Sequence[int]]  # without padding
    rewards: Sequence[float | None]
    verdicts: Sequence[str]


class RecordedReward:
    """Judges completions and writes one line per generation batch: step, prompt ids, rewards, verdicts, tokens.

    `tokens` are those of the completions; those of the prompts are written as well where the rows have a column
    `prompt_tokens`. The lines are what re-scored strategies and the cost ledger read. `latest` is the batch judged
    last. `forget_from` drops what an interrupted attempt wrote beyond the checkpoint that training resumes from.

    Every process judges its part of a batch, and `latest` is that part; the first one writes the line for all.
    """

    __name__ = "verdict"

    def __init__(self, judge: Judge, path: Path) -> None:
        self._judge, self._path = judge, path
        self.latest: Judged | None = None

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
        line: dict[str, Any] = {
            "step": columns["trainer_state"].global_step,
            "prompt_ids": prompt_id,
            "rewards": rewards,
            "verdicts": dict(sorted(Counter(verdicts).items())),
            "tokens": sum(len(ids) for ids in completion_ids),
        }
        if "prompt_tokens" in columns:
            line["prompt_tokens"] = sum(columns["prompt_tokens"])
        lines = process_group().gather(line)
        if process_group().is_main:
            append_jsonl(self._path, _joined(lines))
        self.latest = Judged(prompt_id, texts, completion_ids, rewards, verdicts)
        return rewards

    def forget_from(self, step: int) -> None:
        """Drop the lines of batches at or after an optimiser step."""
        cut_jsonl(self._path, lambda row: row["step"] < step)


def _joined(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The line of a generation batch, from those of its parts."""
    line = dict(rows[0])
    for row in rows[1:]:
        line |= {name: [*line[name], *row[name]] for name in ("prompt_ids", "rewards")}
        line |= {name: line[name] + row[name] for name in ("tokens", "prompt_tokens") if name in line}
        line["verdicts"] = dict(sorted((Counter(line["verdicts"]) + Counter(row["verdicts"])).items()))
    return line
