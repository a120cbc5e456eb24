"""A verifier as a TRL reward function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cropi.exchange.rewards import Rewards
from cropi.trl.messages import worded


class Verified:
    """A verifier as a TRL reward function: 1 or 0, and None for an unreadable gold answer.

    Verifiers run in processes that can be killed. With `graded=True`, a verifier that scores returns its scores.

        GRPOTrainer(..., reward_funcs=Verified("math"))
        Verified("exact", marker="answer", verification={"processes": 8})

    Gold answers come from the column `answer`, else `solution`; `source`, `extra_info` and `metadata` are passed to
    verifiers that need them. Raises ConfigError for an unknown verifier or setting, DataError for rows without an
    answer.
    """

    def __init__(self, kind: str, *, verification: dict[str, Any] | None = None, **settings: Any) -> None:
        with worded():
            self._rewards = Rewards({"type": kind, **settings}, verification, where="Verified")
        self.__name__ = kind

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        with worded():
            return self._rewards.trl(completions, **columns)
