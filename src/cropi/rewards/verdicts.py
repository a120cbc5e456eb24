"""What a verifier is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

CORRECT = "correct"
WRONG = "wrong"
UNPARSEABLE_ANSWER = "unparseable_answer"  # the completion holds no answer in the form asked for: reward 0
UNPARSEABLE_GOLD = "unparseable_gold"  # the recorded answer is not in that form: the row is excluded, never scored 0
TIMEOUT = "timeout"  # twice: reward 0
ERROR = "error"  # the verifier raised, or its process died twice: reward 0
VERDICTS = (CORRECT, WRONG, UNPARSEABLE_ANSWER, UNPARSEABLE_GOLD, TIMEOUT, ERROR)


class Answered(NamedTuple):
    """A completion beside the recorded (gold) answer, and what some verifiers ask for."""

    completion: str
    answer: str
    source: str = ""
    prompt: str = ""  # JSON: text or chat messages
    extra: str = ""  # JSON: an object with what else the data holds


class Judgement(NamedTuple):
    """A verdict, the wall-clock seconds that it took, and what went wrong where something did."""

    verdict: str
    seconds: float
    note: str = ""


Judge = Callable[[Sequence[Answered]], list[Judgement]]  # in the order of the rows


def answered(completion: str, prompt: Mapping[str, Any]) -> Answered:
    """A completion of a row of the prompt table."""
    return Answered(completion, prompt["answer"], prompt["source"], prompt["messages"], prompt.get("extra") or "")


def reward(verdict: str) -> float | None:
    """1 for correct, None (no reward at all) for a gold answer that cannot be read, 0 for anything else."""
    return None if verdict == UNPARSEABLE_GOLD else float(verdict == CORRECT)
