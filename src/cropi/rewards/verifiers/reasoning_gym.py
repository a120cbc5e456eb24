"""The verifier `reasoning_gym`: tasks of the package reasoning-gym, with guards where a task's scorer is too kind."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field

from cropi.prompt_text import last_turn
from cropi.rewards.verifier import UNPARSEABLE_ANSWER, UNPARSEABLE_GOLD, Answered, Graded, ScoringVerifier, Verify
from cropi.rewards.verifiers.python_function import extra_columns

Score = Callable[..., float]
Entry = Mapping[str, Any]

NONSENSE = "\N{REPLACEMENT CHARACTER}"  # the right answer of no task


class ReasoningGymVerifier(ScoringVerifier):
    """Right when a task of reasoning-gym scores the answer high enough. Many of its tasks give partial credit.

    The answer is in the last `<answer>...</answer>`, else it is the whole completion.
    """

    type: Literal["reasoning_gym"]
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Score from which an answer is right."""

    def load(self) -> Verify:
        """Import reasoning-gym. A row's task is its extra column `source_dataset`, else its source."""
        try:
            from reasoning_gym import get_score_answer_fn
            from reasoning_gym.factory import DATASETS
            from reasoning_gym.utils import extract_answer
        except ImportError:
            raise ImportError(
                "the verifier `reasoning_gym` needs that package: pip install 'cropi[reasoning-gym]'"
            ) from None

        tasks: dict[str, tuple[Score, bool]] = {}

        def verify(row: Answered) -> str | Graded:
            metadata = extra_columns(row)
            task = metadata.get("source_dataset") or row.source
            try:
                if task not in tasks:
                    tasks[task] = get_score_answer_fn(task), _disarm(task, DATASETS)
            except ValueError:  # no such task
                return UNPARSEABLE_GOLD
            text = row.completion
            answer = extract_answer(text) if "<answer>" in text else text.strip()
            if answer and answer == row.answer.strip() != str(None):  # some tasks have no gold answer
                return self.verdict(1.0)
            score, uses_sympy = tasks[task]
            refused = (uses_sympy and not is_formula(answer)) or (_not_finite(answer) and not _not_finite(row.answer))
            if not answer or refused:
                return UNPARSEABLE_ANSWER
            entry = {"question": last_turn(row.prompt), "answer": row.answer, "metadata": metadata}
            return self.verdict(_guarded_score(task, answer, entry, score))

        return verify


def _guarded_score(task: str, answer: str, entry: Entry, score: Score) -> float:
    """The task's score, or 0 for an answer that would earn it without solving the task."""
    earned = float(score(answer=answer, entry=entry))
    guard = _GUARDS.get(task, lambda *_: True)
    return earned if earned > 0 and guard(answer, entry) and _beats_nonsense(answer, entry, earned, score) else 0.0


_NOT_FINITE = re.compile(r"(?<![a-z])s?(?:nan|inf(?:inity)?)[ij]?(?![a-z])", re.IGNORECASE)


def _not_finite(text: str) -> bool:
    """Whether Python reads a part of the text as NaN or infinity, which pass many comparisons of distances."""
    return bool(_NOT_FINITE.search(text) or _NOT_FINITE.search("".join(text.split())))


def _beats_nonsense(answer: str, entry: Entry, earned: float, score: Score) -> bool:
    """Whether an answer is the gold one or earns more than nonsense does: some scorers ignore the answer."""
    if _plain(answer) == _plain(entry["answer"]):
        return True
    try:
        return earned > float(score(answer=NONSENSE, entry=entry))
    except Exception:
        return True  # the scorer read the nonsense and failed on it


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _near_coin_flip(answer: str, entry: Entry) -> bool:
    """The task accepts every prefix of the gold answer, and 0 for what is near it."""
    given, gold = (Fraction(text.replace(",", "")) for text in (answer, entry["answer"]))
    return abs(given - gold) <= min(Fraction(1, 10_000), gold / 100)


def _arithmetic(answer: str, entry: Entry) -> bool:
    """Numbers and signs alone: `pi - pi` and `x / x` make any number without calculation."""
    return not re.search("[A-Za-z!]", answer)


def _makes_24(answer: str, entry: Entry) -> bool:
    """The task accepts any four numbers, and rounds."""
    from sympy import Abs, parse_expr

    numbers = sorted(map(str, entry["metadata"]["numbers"]))
    used = sorted(re.findall(r"[\d.]+", answer))
    return _arithmetic(answer, entry) and used == numbers and bool(Abs(parse_expr(answer) - 24) < 1e-6)


# Further conditions on answers to tasks whose own scorers accept too much.
_GUARDS: dict[str, Callable[[str, Entry], bool]] = {
    "coin_flip": _near_coin_flip,
    "countdown": _arithmetic,
    "puzzle24": _makes_24,
    "spell_backward": lambda answer, entry: len(answer) <= len(entry["answer"]),
}


def _disarm(task: str, known: Mapping[str, Any]) -> bool:
    """Let a task's module evaluate literals only. Returns whether it passes answers to sympy, which runs Python too.

    ValueError for an unknown task.
    """
    if task not in known:
        raise ValueError(task)
    module = sys.modules[known[task][0].__module__]
    source = inspect.getsource(module)
    if re.search(r"\beval\(", source):
        module.eval = ast.literal_eval  # type: ignore[attr-defined]  # a global takes precedence over the builtin
    return "sympy" in source


_TRIGONOMETRIC = frozenset({"sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh"})
_FUNCTIONS = _TRIGONOMETRIC | {"asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "Abs", "pi", "Integral"}
# Signs that no formula needs, attributes, other number bases, and calls of a symbol (S and N are functions of sympy's).
_NO_FORMULA = re.compile(r"[^0-9A-Za-z\s+\-*/^().,=!]|\.\s*[A-Za-z]|0[xXoObB]|\b[A-Za-z]\s*\(")


def is_formula(answer: str) -> bool:
    """Whether an answer holds only numbers, signs, one-letter symbols and school functions: no code that could run."""
    words = re.findall("[A-Za-z]+", answer)
    return not _NO_FORMULA.search(answer) and all(len(word) == 1 or word in _FUNCTIONS for word in words)
