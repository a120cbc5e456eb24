"""A verifier of ours as the reward function of TRL, verl, slime, OpenRLHF, and of verifiers' tasks (prime-rl)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cropi.errors import DataError
from cropi.loading import verification_of, verifier_of
from cropi.rewards.pool import judge_of
from cropi.rewards.verdicts import Answered, reward


class Rewards:
    """Rewards of 1 and 0 by a verifier, in processes that can be killed; one method for each trainer's form.

        rewards = Rewards({"type": "math"})
        compute_score = rewards.verl

    A gold answer that cannot be read gives None where the trainer knows that (TRL), else 0. ConfigError for a verifier
    or settings that there are not.
    """

    def __init__(
        self, verifier: Mapping[str, Any], verification: Mapping[str, Any] | None = None, *, where: str = "Rewards"
    ) -> None:
        self._judge = judge_of(verifier_of(verifier, where), verification_of(verification or {}, where))

    def __call__(self, rows: Sequence[Answered]) -> list[float | None]:
        return [reward(judgement.verdict) for judgement in self._judge(rows)]

    def trl(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """TRL's `reward_funcs`. The gold answers are the column `answer`, else `solution`; `source`, `extra`,
        `extra_info` and `metadata` are passed on. DataError for rows without an answer."""
        golds = columns.get("answer", columns.get("solution"))
        if golds is None:
            raise DataError(
                "the rows have no recorded answers", where="train_dataset", fix="add a column `answer` or `solution`."
            )
        empty = [None] * len(completions)
        sources, prompts = columns.get("source", empty), columns.get("prompts", empty)
        extras = next((columns[name] for name in ("extra", "extra_info", "metadata") if name in columns), empty)
        return self(
            [
                _row(_text(completion), gold, source, "" if prompt is None else json.dumps(prompt), extra)
                for completion, gold, source, prompt, extra in zip(
                    completions, golds, sources, prompts, extras, strict=True
                )
            ]
        )

    def verl(self, data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any) -> float:
        """verl's `compute_score`, for `reward.custom_reward_function`."""
        return self([_row(solution_str, ground_truth, data_source, "", extra_info)])[0] or 0.0

    async def slime(self, args: Any, sample: Any, **_: Any) -> float:
        """slime's `--custom-rm-path`: one sample with `response`, `label` and `metadata`."""
        metadata = sample.metadata or {}
        row = _row(sample.response, sample.label, metadata.get("source"), "", metadata)
        return (await asyncio.to_thread(self, [row]))[0] or 0.0

    def openrlhf(self, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **_: Any) -> Any:
        """OpenRLHF's `reward_func`, for `--reward.remote_url`: a query is the prompt with its completion."""
        import torch

        rows = [
            _row(query.removeprefix(prompt), label, None, "", None)
            for query, prompt, label in zip(queries, prompts, labels, strict=True)
        ]
        found = torch.tensor([value or 0.0 for value in self(rows)])
        return {"rewards": found, "scores": found, "extra_logs": {"correct": found}}

    async def task(self, completion: str, answer: str, source: str, extra: str) -> float:
        """One completion of a task of verifiers', which prime-rl trains on."""
        return (await asyncio.to_thread(self, [_row(completion, answer, source, "", extra)]))[0] or 0.0


def _row(completion: str, gold: Any, source: Any, prompt: str, extra: Any) -> Answered:
    facts = extra if isinstance(extra, str) else json.dumps(extra, default=str) if isinstance(extra, dict) else ""
    return Answered(completion, str(gold), str(source or ""), prompt, facts)


def _text(completion: Any) -> str:
    """Of a completion as TRL gives it: text, or chat messages of which the last counts."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
