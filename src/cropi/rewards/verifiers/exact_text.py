"""The verifier `exact`: the text after a marker equals the recorded answer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cropi.rewards.verifier import CORRECT, UNPARSEABLE_ANSWER, UNPARSEABLE_GOLD, WRONG, Answered, VerifierTable, Verify


class ExactVerifier(VerifierTable):
    """Right when the text after the last marker equals the recorded answer, white space aside."""

    type: Literal["exact"]
    marker: Annotated[str, Field(min_length=1)] | None = None
    """Text before the answer; its last occurrence counts. Unset: the whole completion is the answer."""

    def load(self) -> Verify:
        return self._judge

    def _judge(self, row: Answered) -> str:
        expected = row.answer.split()
        if not expected:
            return UNPARSEABLE_GOLD
        answer = row.completion
        if self.marker is not None:
            _, found, answer = answer.rpartition(self.marker)
            if not found:
                return UNPARSEABLE_ANSWER
        given = answer.split()
        if not given:
            return UNPARSEABLE_ANSWER
        return CORRECT if given == expected else WRONG

    def completion_with(self, answer: str) -> str:
        return answer if self.marker is None else f"{self.marker} {answer}"
