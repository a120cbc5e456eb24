"""The verifier `gsm8k`: the number after the last `####`."""

from __future__ import annotations

from typing import Literal

from cropi.rewards.verifier import Answered, VerifierTable, Verify
from cropi.rewards.verifiers.numeric import compare_numbers, numbers


class Gsm8kVerifier(VerifierTable):
    """Right when the number after the last `####` equals the one after the last `####` of the recorded answer."""

    type: Literal["gsm8k"]

    def load(self) -> Verify:
        return _judge

    def completion_with(self, answer: str) -> str:
        return answer if "####" in answer else f"#### {answer}"


def _judge(row: Answered) -> str:
    _, marked, answer = row.completion.rpartition("####")
    first, expected = ((numbers(text) or [None])[0] for text in (answer, row.answer.rpartition("####")[2]))
    return compare_numbers(first if marked else None, expected, 0.0)
