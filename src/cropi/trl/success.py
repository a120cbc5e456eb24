"""What says that a completion is right: one of the trainer's reward functions, or another of that form."""

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
from cropi.rewards.verdicts import ERROR, UNPARSEABLE_GOLD, Graded, GradeError, Judgement, judged
from cropi.trl.selector import Selector

OWN = ("prompt", "completion", "completion_ids")  # columns that TRL does not pass on as they are


@dataclass
class Success:
    """A reward function, the value from which a completion is right, and whether prompts are chosen by its values."""

    name: str
    function: Callable[..., Any]
    place: int | None  # among the trainer's reward functions; None: it is none of them
    threshold: float
    graded: bool
    least: float = math.inf  # of the values so far
    largest: float = -math.inf

    @classmethod
    def of(cls, selector: Selector, functions: Sequence[Any], names: Sequence[str]) -> Success:
        """What a selector names. ConfigError for what is no reward function, or a name that several have."""
        chosen = selector.success
        if chosen is None and len(functions) > 1:
            raise ConfigError(
                f"the trainer has several reward functions ({', '.join(names)}), and one has to say what is right",
                where="Selector.success",
                fix="name it, as in Selector(success=...), or give a function of its own.",
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
                f"{names[chosen]} is a reward model, which does not say whether a completion is right",
                where="Selector.success",
                fix="name a reward function, or give one.",
            )
        return cls(names[chosen], functions[chosen], chosen, selector.threshold, selector.graded)

    @property
    def facts(self) -> str:
        """What it has given so far, for a message."""
        by = f"prompts are chosen by the reward function {self.name}"
        if self.largest < self.least:
            return f"{by}, which gave no value here (it gave None, or the completions were judged earlier)"
        lie = f"{by}, whose values lie between {self.least:g} and {self.largest:g}"
        return lie if self.graded else f"{lie}, and from {self.threshold:g} on (threshold) a completion is right"

    @property
    def identity(self) -> str:
        """SHA-256 of its name, threshold, grading and text, if that can be had; what it calls is not part of it."""
        try:
            text = inspect.getsource(inspect.unwrap(self.function))
        except (OSError, TypeError):
            text = repr(type(self.function))
        return hashlib.sha256(f"{self.name} {self.threshold} {self.graded} {text}".encode()).hexdigest()

    def judged(self, value: float | None) -> Judgement:
        """What a reward comes to. None and NaN, as TRL has it, say that the row is not for this function.

        A grade outside 0 to 1 is an error, which earns nothing.
        """
        if value is None or math.isnan(value):
            return Judgement(UNPARSEABLE_GOLD, 0.0)
        score, threshold = float(np.float32(value)), float(np.float32(self.threshold))  # as TRL keeps rewards
        self.least, self.largest = min(self.least, score), max(self.largest, score)
        try:
            found = judged(score, threshold, graded=self.graded)
        except GradeError as error:
            warn_once(
                f"reward function {self.name} gave a value outside 0 to 1, which counts as 0 where prompts are chosen; "
                "give Selector(success=...) a function whose values lie there, or leave out graded=True"
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
        """Judgements by the function, called as TRL calls it; awaited in TRL's loop, if it has one: clients and locks
        belong to a loop."""
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
                fix="return one for each.",
            )
        return [self.judged(value) for value in result]
