"""The list of verifiers, and the processes that they run in."""

from __future__ import annotations

import pkgutil
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from cropi.rewards import verifiers
from cropi.setting_types import Positive, PositiveNumber, Table

# One line for each verifier: its file in cropi/rewards/verifiers, and its class.
VERIFIERS = (
    "exact_text:ExactVerifier",
    "numeric:NumericVerifier",
    "gsm8k:Gsm8kVerifier",
    "boxed:BoxedVerifier",
    "math_answer:MathVerifier",
    "reasoning_gym:ReasoningGymVerifier",
    "python_function:FunctionVerifier",
    "verl:VerlVerifier",
)

if TYPE_CHECKING:
    Verifier = verifiers.Verifier
else:
    _CLASSES: list[Any] = [pkgutil.resolve_name(f"{verifiers.__name__}.{entry}") for entry in VERIFIERS]
    Verifier = Annotated[reduce(or_, _CLASSES), Field(discriminator="type")]

SCRIPT_REWARDS = "trainer.reward_funcs"  # stands for the reward functions of a TRL script, which only the script has


class VerificationConfig(Table):
    """The processes that verifiers run in."""

    processes: Annotated[int, Field(ge=1, le=1024)] = 2
    """Largest number of processes."""
    seconds: PositiveNumber = 5.0
    """Wall-clock time for one answer. A process that takes longer is ended; the answer is tried once more and then
    judged `timeout`."""
    memory_mb: Positive = 1024
    """MiB that judging may take beyond what a process has after start-up, if the system can limit it."""
