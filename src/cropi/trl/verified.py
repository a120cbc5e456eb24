"""A verifier of ours as a reward function of TRL's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cropi.exchange.rewards import Rewards
from cropi.trl.wording import worded


class Verified:
    """Rewards of 1 and 0 by a verifier, in processes that can be killed; None for a gold answer that cannot be read.
    With `graded=True`, where the verifier scores, its scores.

        GRPOTrainer(..., reward_funcs=Verified("math"))
        Verified("exact", marker="answer", verification={"processes": 8})

    The gold answers are the column `answer`, else `solution`; `source`, `extra_info` and `metadata` are passed on to
    verifiers that ask for them. ConfigError for a verifier or settings that there are not, DataError for rows without
    an answer.
    """

    def __init__(self, kind: str, *, verification: dict[str, Any] | None = None, **settings: Any) -> None:
        with worded():
            self._rewards = Rewards({"type": kind, **settings}, verification, where="Verified")
        self.__name__ = kind

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        with worded():
            return self._rewards.trl(completions, **columns)
