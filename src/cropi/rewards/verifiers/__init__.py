"""Verifiers, one file each: its settings and how it judges. A new one needs its file and an import here.

The files are free of torch and import optional packages in `load` alone. All verifiers run in the processes of `pool`.
"""

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from cropi.rewards.verifier import ScoringVerifier, VerifierTable
from cropi.rewards.verifiers.boxed import BoxedVerifier as BoxedVerifier
from cropi.rewards.verifiers.exact_text import ExactVerifier as ExactVerifier
from cropi.rewards.verifiers.gsm8k import Gsm8kVerifier as Gsm8kVerifier
from cropi.rewards.verifiers.math_answer import MathVerifier as MathVerifier
from cropi.rewards.verifiers.numeric import NumericVerifier as NumericVerifier
from cropi.rewards.verifiers.python_function import FunctionVerifier as FunctionVerifier
from cropi.rewards.verifiers.reasoning_gym import ReasoningGymVerifier as ReasoningGymVerifier

VERIFIERS: tuple[type[VerifierTable], ...] = tuple(
    table
    for table in (*VerifierTable.__subclasses__(), *ScoringVerifier.__subclasses__())
    if table is not ScoringVerifier
)

if TYPE_CHECKING:
    Verifier = VerifierTable
else:
    Verifier = Annotated[Union[VERIFIERS], Field(discriminator="type")]  # noqa: UP007 - a union of a tuple
