"""The command `cropi`, killed by SIGKILL from within at an exact moment.

    python dying.py before|after MODULE[:CLASS] FUNCTION N ARGUMENTS...

The moment is the Nth call of the function, before it does anything or when it has done all.
"""

import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def killing(function: Callable[..., Any], when: str, count: int) -> Callable[..., Any]:
    calls = 0

    def called(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        result = None if when == "before" and calls == count else function(*arguments, **named)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return called


def main() -> None:
    when, place, name, count, *arguments = sys.argv[1:]
    module, _, owner = place.partition(":")
    holder = importlib.import_module(module)
    holder = getattr(holder, owner) if owner else holder
    setattr(holder, name, killing(getattr(holder, name), when, int(count)))
    from cropi.__main__ import app

    app(arguments, prog_name="cropi")


if __name__ == "__main__":
    main()
