"""Make a Typer command of a function that takes one dataclass: each field is an option or argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

Options = TypeVar("Options")


def command_of(run: Callable[[Options], None], options: type[Options]) -> Callable[..., None]:
    """The command that fills `options` from the command line and calls `run` with it."""
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        parameter.replace(annotation=hints[name]) for name, parameter in inspect.signature(options).parameters.items()
    ]

    def command(**values: Any) -> None:
        run(options(**values))

    command.__doc__ = run.__doc__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command
