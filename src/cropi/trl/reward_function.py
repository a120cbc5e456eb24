"""Reward functions: the one that judges completions for a `Selector`, and a verifier as one."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from cropi.asynchronous import awaited
from cropi.console import warn_once
from cropi.errors import ConfigError
from cropi.exchange.rewards import Rewards
from cropi.rewards.verdicts import ERROR, UNPARSEABLE_GOLD, Graded, GradeError, Judgement, judged
from cropi.trl.messages import worded
from cropi.trl.selector import Selector

OWN = ("prompt", "completion", "completion_ids")  # columns that TRL does not pass on unchanged


@dataclass
class Success:
    """The reward function that says whether a completion is right, and how to read its values."""

    name: str
    function: Callable[..., Any]
    place: int | None  # index in the trainer's reward functions; None: another function
    threshold: float  # values from it on are right
    graded: bool  # choose prompts by the values themselves
    least: float = math.inf  # of the values so far
    largest: float = -math.inf

    @classmethod
    def of(cls, selector: Selector, functions: Sequence[Any], names: Sequence[str]) -> Success:
        """Find the reward function that a selector names; ConfigError if there is none or more than one."""
        chosen = selector.success
        if chosen is None and len(functions) > 1:
            raise ConfigError(
                f"the trainer has several reward functions ({', '.join(names)}), and one must judge completions",
                where="Selector.success",
                fix="name one with Selector(success=...), or pass another function.",
            )
        chosen = 0 if chosen is None else chosen
        if callable(chosen):
            return cls(getattr(chosen, "__name__", "success"), chosen, None, selector.threshold, selector.graded)
        if isinstance(chosen, str):
            chosen = list(names).index(chosen) if list(names).count(chosen) == 1 else chosen
        if not isinstance(chosen, int) or not 0 <= chosen < len(functions):
            raise ConfigError(
                f"{chosen!r} names no reward function, or more than one",
                where="Selector.success",
                fix=f"name one of {', '.join(names)}, give its place, or a function.",
            )
        if isinstance(functions[chosen], nn.Module):
            raise ConfigError(
                f"{names[chosen]} is a reward model, which cannot say whether a completion is right",
                where="Selector.success",
                fix="name or pass a reward function.",
            )
        return cls(names[chosen], functions[chosen], chosen, selector.threshold, selector.graded)

    @property
    def facts(self) -> str:
        """Describe its values so far, for a message."""
        by = f"prompts are chosen by the reward function {self.name}"
        if self.largest < self.least:
            return f"{by}, which returned no value here (it returned None, or the completions were judged earlier)"
        lie = f"{by}, whose values lie between {self.least:g} and {self.largest:g}"
        return lie if self.graded else f"{lie}, and values from {self.threshold:g} (threshold) count as right"

    @property
    def identity(self) -> str:
        """SHA-256 of its name, threshold, grading and source text, if available, without functions that it calls."""
        try:
            text = inspect.getsource(inspect.unwrap(self.function))
        except (OSError, TypeError):
            text = repr(type(self.function))
        return hashlib.sha256(f"{self.name} {self.threshold} {self.graded} {text}".encode()).hexdigest()

    def judged(self, value: float | None) -> Judgement:
        """Judge a reward. As in TRL, None and NaN mean that the row is not for this function.

        A grade outside [0, 1] is an error and counts as 0.
        """
        if value is None or math.isnan(value):
            return Judgement(UNPARSEABLE_GOLD, 0.0)
        score, threshold = float(np.float32(value)), float(np.float32(self.threshold))  # as TRL keeps rewards
        self.least, self.largest = min(self.least, score), max(self.largest, score)
        try:
            found = judged(score, threshold, graded=self.graded)
        except GradeError as error:
            warn_once(
                f"reward function {self.name} gave a value outside 0 to 1, which counts as 0 when prompts are chosen; "
                "pass Selector(success=...) a function with values in that range, or leave out graded=True"
            )
            return Judgement(ERROR, 0.0, str(error))
        return Judgement(found.verdict, 0.0, grade=found.grade) if isinstance(found, Graded) else Judgement(found, 0.0)

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: Sequence[Any],
        columns: Mapping[str, list[Any]],
        state: Any,
        loop: asyncio.AbstractEventLoop | None,
    ) -> list[Judgement]:
        """Call the function as TRL does and judge its rewards.

        Coroutines run in TRL's event loop, if it has one, since clients and locks belong to a loop.
        """
        result = awaited(
            self.function(
                prompts=prompts,
                completions=completions,
                completion_ids=list(completion_ids),
                trainer_state=state,
                log_extra=lambda *_: None,
                log_metric=lambda *_: None,
                **{key: values for key, values in columns.items() if key not in OWN},
            ),
            loop,
        )
        if len(result) != len(completions):
            raise ConfigError(
                f"it returned {len(result)} rewards for {len(completions)} completions",
                where=f"reward function {self.name}",
                fix="return one reward per completion.",
            )
        return [self.judged(value) for value in result]


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
