"""A verifier of ours as a reward function of TRL's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cropi.errors import DataError
from cropi.loading import verification_of, verifier_of
from cropi.rewards.pool import judge_of
from cropi.rewards.verdicts import Answered, reward


class Verified:
    """Rewards of 1 and 0 by a verifier, in processes that can be killed; None for a gold answer that cannot be read.

        GRPOTrainer(..., reward_funcs=Verified("math"))
        Verified("exact", marker="answer", verification={"processes": 8})

    The gold answers are the column `answer`, else `solution`; `source`, `extra_info` and `metadata` are passed on to
    verifiers that ask for them. ConfigError for a verifier or settings that there are not, DataError for rows without
    an answer.
    """

    def __init__(self, kind: str, *, verification: dict[str, Any] | None = None, **settings: Any) -> None:
        self._judge = judge_of(
            verifier_of({"type": kind, **settings}, "Verified"),
            verification_of(verification or {}, "Verified"),
        )
        self.__name__ = kind

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        golds = columns.get("answer", columns.get("solution"))
        if golds is None:
            raise DataError(
                "the rows have no recorded answers", where="train_dataset", fix="add a column `answer` or `solution`."
            )
        empty = [None] * len(completions)
        sources, prompts = columns.get("source", empty), columns.get("prompts", empty)
        extras = columns.get("extra_info", columns.get("metadata", empty))
        rows = [
            Answered(
                completion if isinstance(completion, str) else completion[-1]["content"],
                str(gold),
                str(source or ""),
                "" if prompt is None else json.dumps(prompt),
                json.dumps(extra, default=str) if isinstance(extra, dict) else "",
            )
            for completion, gold, source, prompt, extra in zip(
                completions, golds, sources, prompts, extras, strict=True
            )
        ]
        return [reward(judgement.verdict) for judgement in self._judge(rows)]
