"""The verifier `verl`: a reward function in verl's form."""

from __future__ import annotations

from typing import ClassVar, Literal

from cropi.asynchronous import awaited
from cropi.rewards.verdicts import Answered, Graded
from cropi.rewards.verifier import ScoringVerifier, Template, Verify
from cropi.rewards.verifiers.python_function import DottedPath, extra_columns, imported


class VerlVerifier(ScoringVerifier):
    """A `compute_score(data_source, solution_str, ground_truth, extra_info)` of verl, or one like it."""

    pure: ClassVar[bool] = False

    type: Literal["verl"]
    """Picks this verifier."""
    path: DottedPath = "verl.utils.reward_score.default_compute_score"
    """The function, as `module.function`. Its code is run: name only code that you trust."""
    threshold: float = 0.5
    """Score from which a completion is right."""
    written: Template = "{answer}"
    """A right completion with the answer in it; used to check recorded answers against themselves."""

    def load(self) -> Verify:
        function = imported(self.path)

        def verify(row: Answered) -> str | Graded:
            result = awaited(
                function(
                    data_source=row.source,
                    solution_str=row.completion,
                    ground_truth=row.answer,
                    extra_info=extra_columns(row) or None,
                )
            )
            return self.verdict(result["score"] if isinstance(result, dict) else result)

        return verify

    def completion_with(self, answer: str) -> str:
        return self.written.replace("{answer}", answer)
