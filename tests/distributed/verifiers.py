"""Verifiers that end the worker that asks them: tests put this file where their runs begin."""

import os
import signal
from pathlib import Path

KILLED = Path("killed.txt")


def plain(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Whether the last word is the answer."""
    return [
        float(bool(words) and words[-1] == answer[0]) for words in (completion.split() for completion in completions)
    ]


def kills_once(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """The same, but for the first row of all. The file notes which process has died of it."""
    if not KILLED.exists():
        KILLED.write_text(str(os.getppid()))
        os.kill(os.getppid(), signal.SIGKILL)
    return plain(completions, answer)


def kills_always(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Nobody hears the answer."""
    os.kill(os.getppid(), signal.SIGKILL)
    return plain(completions, answer)
