"""Verifiers that are someone else's: tasks of reasoning-gym, reward functions in TRL's form, verl's `compute_score`."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from cropi.asynchronous import awaited
from cropi.config import FunctionVerifier, ReasoningGymVerifier, VerlVerifier
from cropi.errors import hint
from cropi.leakage import turn_text
from cropi.rewards.verdicts import UNPARSEABLE_ANSWER, UNPARSEABLE_GOLD, Answered, Graded, judged
from cropi.rewards.verifiers import Verify


def reasoning_gym_verifier(config: ReasoningGymVerifier) -> Verify:
    """Row -> verdict by the score that the task gives. ImportError where reasoning-gym is missing.

    The task is named by the entry's `metadata.source_dataset`, in the row's extra columns, else by its source.
    """
    try:
        from reasoning_gym import get_score_answer_fn
        from reasoning_gym.factory import DATASETS
        from reasoning_gym.utils import extract_answer
    except ImportError:
        raise ImportError(
            "the verifier `reasoning_gym` needs that package: pip install 'cropi[reasoning-gym]'"
        ) from None

    tasks: dict[str, tuple[Callable[..., float], bool]] = {}

    def verify(row: Answered) -> str | Graded:
        metadata = _extra(row)
        entry = {"question": question(row.prompt), "answer": row.answer, "metadata": metadata}
        task = metadata.get("source_dataset") or row.source
        try:
            if task not in tasks:
                tasks[task] = get_score_answer_fn(task), _disarmed(task, DATASETS)
        except ValueError:  # no such task
            return UNPARSEABLE_GOLD
        score, by_sympy = tasks[task]
        if config.marker is not None:
            _, found, given = row.completion.rpartition(config.marker)
            answer = given.strip() if found else None
        else:
            answer = extract_answer(row.completion) if "<answer>" in row.completion else row.completion.strip()
        if answer and answer == row.answer.strip() != str(None):  # some tasks have no gold answer
            return _judged(1.0, config)
        if not answer or (by_sympy and not is_formula(answer)) or (_not_finite(answer) and not _not_finite(row.answer)):
            return UNPARSEABLE_ANSWER
        earned = float(score(answer=answer, entry=entry))
        besides = _BESIDES.get(task, lambda *_: True)
        genuine = earned > 0 and besides(answer, entry) and _looked_at(answer, entry, earned, score)
        return _judged(earned if genuine else 0.0, config)

    return verify


_NOT_FINITE = re.compile(r"(?<![a-z])s?(?:nan|inf(?:inity)?)[ij]?(?![a-z])", re.IGNORECASE)
NONSENSE = "\N{REPLACEMENT CHARACTER}"  # no task's right answer


def _not_finite(text: str) -> bool:
    """Whether it holds what Python reads as a number that is none: no distance to it is large."""
    return bool(_NOT_FINITE.search(text) or _NOT_FINITE.search("".join(text.split())))


def _looked_at(answer: str, entry: Mapping[str, Any], earned: float, score: Callable[..., float]) -> bool:
    """Whether an answer earns more than nonsense does, or is the gold one: some scorers look at neither."""
    if _plain(answer) == _plain(entry["answer"]):
        return True
    try:
        return earned > float(score(answer=NONSENSE, entry=entry))
    except Exception:
        return True  # it has stumbled over nonsense, as it has not over the answer


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _near_coin_flip(answer: str, entry: Mapping[str, Any]) -> bool:
    """The task itself takes each start of the gold answer for right, and 0 for what is near it."""
    given, gold = (Fraction(text.replace(",", "")) for text in (answer, entry["answer"]))
    return abs(given - gold) <= min(Fraction(1, 10_000), gold / 100)


def _arithmetic(answer: str, entry: Mapping[str, Any]) -> bool:
    """Numbers and signs alone: with `pi - pi` and `x / x` one need not calculate."""
    return not re.search("[A-Za-z!]", answer)


def _makes_24(answer: str, entry: Mapping[str, Any]) -> bool:
    """The task itself takes any four numbers, and rounds."""
    from sympy import Abs, parse_expr

    numbers = sorted(map(str, entry["metadata"]["numbers"]))
    used = sorted(re.findall(r"[\d.]+", answer))
    return _arithmetic(answer, entry) and used == numbers and bool(Abs(parse_expr(answer) - 24) < 1e-6)


# What an answer must be besides, to earn anything, where a task's scorer takes it for right on too little.
_BESIDES: dict[str, Callable[[str, Mapping[str, Any]], bool]] = {
    "coin_flip": _near_coin_flip,
    "countdown": _arithmetic,
    "puzzle24": _makes_24,
    "spell_backward": lambda answer, entry: len(answer) <= len(entry["answer"]),
}


def _disarmed(task: str, known: Mapping[str, Any]) -> bool:
    """Make a task's module evaluate nothing but literals; returns whether it hands answers to sympy, which evaluates
    them as Python too. ValueError for a task that there is not."""
    if task not in known:
        raise ValueError(task)
    module = sys.modules[known[task][0].__module__]
    source = inspect.getsource(module)
    if re.search(r"\beval\(", source):
        module.eval = ast.literal_eval  # type: ignore[attr-defined]  # a global of that name goes before the builtin
    return "sympy" in source


_TRIGONOMETRIC = frozenset({"sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh"})
_FUNCTIONS = _TRIGONOMETRIC | {"asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "Abs", "pi", "Integral"}
# Signs that no formula needs, attributes, other bases, calls of a symbol (S and N are functions of sympy's).
_NO_FORMULA = re.compile(r"[^0-9A-Za-z\s+\-*/^().,=!]|\.\s*[A-Za-z]|0[xXoObB]|\b[A-Za-z]\s*\(")


def is_formula(answer: str) -> bool:
    """Whether an answer is numbers, signs, symbols of one letter and functions of school: nothing that could be run."""
    words = re.findall("[A-Za-z]+", answer)
    return not _NO_FORMULA.search(answer) and all(len(word) == 1 or word in _FUNCTIONS for word in words)


def function_verifier(config: FunctionVerifier) -> Verify:
    """Row -> verdict by a reward function in TRL's form: `f(completions, **columns) -> rewards`, called with one row,
    and waited for where it is asynchronous.

    It gets `prompts`, `completions`, the recorded answer under the configured name, `source`, and the row's extra
    columns, each as a list of one, as far as its signature takes them.
    """
    function = _imported(config.path)
    accepted = _parameters(function)

    def verify(row: Answered) -> str | Graded:
        completion = [{"role": "assistant", "content": row.completion}] if config.messages else row.completion
        prompt = json.loads(row.prompt) if row.prompt else ""
        columns = {name: [value] for name, value in _extra(row).items()}
        columns |= {"prompts": [prompt], "completions": [completion], "source": [row.source]}
        columns[config.answer_as] = [row.answer]
        given = columns if accepted is None else {k: v for k, v in columns.items() if k in accepted}
        rewards = awaited(function(**given))
        if not hasattr(rewards, "__len__"):
            kind = type(rewards).__name__
            raise TypeError(f"{config.path} returned one {kind}, not a list with a reward for each completion")
        if len(rewards) != 1:
            raise ValueError(f"{config.path} returned {len(rewards)} rewards for one completion")
        return _judged(rewards[0], config)

    return verify


def verl_verifier(config: VerlVerifier) -> Verify:
    """Row -> verdict by `compute_score(data_source, solution_str, ground_truth, extra_info)`: a number, or a dict with
    `score`."""
    function = _imported(config.path)

    def verify(row: Answered) -> str | Graded:
        result = awaited(
            function(
                data_source=config.data_source or row.source,
                solution_str=row.completion,
                ground_truth=row.answer,
                extra_info=_extra(row) or None,
            )
        )
        return _judged(result["score"] if isinstance(result, dict) else result, config)

    return verify


def _judged(score: Any, config: ReasoningGymVerifier | FunctionVerifier | VerlVerifier) -> str | Graded:
    """None, in TRL, says that a row is not for this function."""
    return UNPARSEABLE_GOLD if score is None else judged(float(score), config.threshold, graded=config.graded)


def _extra(row: Answered) -> dict[str, Any]:
    found = json.loads(row.extra) if row.extra else {}
    return found if isinstance(found, dict) else {}


def question(prompt: str) -> str:
    """The text of a prompt, or of its last message."""
    messages = json.loads(prompt) if prompt else ""
    return messages if isinstance(messages, str) else turn_text(messages[-1])


def _imported(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        found = importlib.import_module(module)
        function = getattr(found, name)
    except AttributeError:
        raise ImportError(
            f"{path} cannot be imported: {module} has no {name}; {hint(name, dir(found), 'define it there')}"
        ) from None
    except ImportError as error:
        raise ImportError(f"{path} cannot be imported ({error})") from None
    if not callable(function):
        raise TypeError(f"{path} is not a function")
    return function


def _parameters(function: Callable[..., Any]) -> set[str] | None:
    """Names that a function takes; None where it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}
