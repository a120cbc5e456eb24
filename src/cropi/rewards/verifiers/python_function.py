"""The verifier `function`: a Python reward function in TRL's or verl's form."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from cropi.asynchronous import awaited
from cropi.errors import hint
from cropi.rewards.verifier import Answered, Graded, ScoringVerifier, Template, Verify

SCRIPT_REWARDS = "trainer.reward_funcs"  # a path for the reward functions of a TRL script, which only the script has


def _dotted(path: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", path):
        raise ValueError("must be MODULE.FUNCTION, as rewards.right for the function right of rewards.py")
    return path


DottedPath = Annotated[str, AfterValidator(_dotted)]


class FunctionVerifier(ScoringVerifier):
    """A reward function of your own; it gets one completion at a time. Its signature is TRL's, or that of verl's
    `compute_score(data_source, solution_str, ground_truth, extra_info)`."""

    pure: ClassVar[bool] = False

    type: Literal["function"]
    path: DottedPath
    """The function, as `module.function`, importable from the folder where the run is started. Its code is run: name
    only code that you trust."""
    threshold: float = 0.5
    """Reward from which a completion is right. If the function returns None, the row is excluded."""
    answer_as: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] = "answer"
    """Name of the keyword argument with the recorded answers (TRL's own functions: `solution`)."""
    messages: bool = False
    """Pass completions as chat messages instead of text."""
    written: Template = "{answer}"
    """A right completion with the answer in it; used to check recorded answers against themselves."""

    def load(self) -> Verify:
        """Import the function. It is called with one row: `f(completions, **columns) -> rewards`.

        The columns are `prompts`, `completions`, the recorded answer under its configured name, `source`, and the
        row's extra columns, each as a list of one. A function without `**kwargs` gets those in its signature.
        """
        function = imported(self.path)
        parameters = inspect.signature(function).parameters
        if "solution_str" in parameters:
            return lambda row: self.verdict(_verl_score(function, row))
        takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        by_name = [one for one in parameters.values() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        needed = {one.name for one in by_name if one.default is one.empty}

        def verify(row: Answered) -> str | Graded:
            columns = self._columns(row)
            if missing := ", ".join(sorted(needed - columns.keys())):
                raise TypeError(f"{self.path} needs {missing}, and the row has {', '.join(sorted(columns))}")
            rewards = awaited(function(**{k: v for k, v in columns.items() if takes_any or k in parameters}))
            if not hasattr(rewards, "__len__"):
                kind = type(rewards).__name__
                raise TypeError(f"{self.path} returned one {kind}, not a list with a reward for each completion")
            if len(rewards) != 1:
                raise ValueError(f"{self.path} returned {len(rewards)} rewards for one completion")
            return self.verdict(rewards[0])

        return verify

    def _columns(self, row: Answered) -> dict[str, list[Any]]:
        completion = [{"role": "assistant", "content": row.completion}] if self.messages else row.completion
        prompt = json.loads(row.prompt) if row.prompt else ""
        columns = {name: [value] for name, value in extra_columns(row).items()}
        columns |= {"prompts": [prompt], "completions": [completion], "source": [row.source]}
        return columns | {self.answer_as: [row.answer]}

    def completion_with(self, answer: str) -> str:
        return self.written.replace("{answer}", answer)


def _verl_score(function: Callable[..., Any], row: Answered) -> float | None:
    given = {"data_source": row.source, "solution_str": row.completion, "ground_truth": row.answer}
    result = awaited(function(**given, extra_info=extra_columns(row) or None))
    return result["score"] if isinstance(result, dict) else result


def extra_columns(row: Answered) -> dict[str, Any]:
    """The row's further columns by name."""
    found = json.loads(row.extra) if row.extra else {}
    return found if isinstance(found, dict) else {}


def imported(path: str) -> Callable[..., Any]:
    """Import `module.function`. ImportError names the closest function if there is none of that name."""
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
