"""The process in which a verifier runs: `python -m cropi.rewards.worker`, started and watched by `Pool`.

It reads one JSON line that says which verifier, then lists of rows, and answers in JSON lines. What verifiers print
goes to standard error. It dies with its parent.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path
from struct import Struct
from typing import Any

NUMBER, SINCE = Struct("=q"), Struct("=d")  # in shared memory: which row it is at (-1: none), and since when
PROGRESS_FD = "CROPI_PROGRESS_FD"  # environment variable: the file of that memory
FLUSH_S = 0.02  # answers wait for each other for so long


def main() -> None:
    """Serve until standard input ends."""
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    progress = mmap.mmap(int(os.environ[PROGRESS_FD]), NUMBER.size + SINCE.size)
    requests = sys.stdin.buffer

    def tell(message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[answers.write(data) :]

    hello = json.loads(requests.readline())
    sys.path[:] = hello["path"]
    try:
        verify = _set_up(hello["verifier"])
    except Exception as error:
        fix = "check the verifier's settings, and that what it needs is installed here."
        tell({"failed": f"{type(error).__name__}: {error}", "fix": fix})
        return
    _limit_memory(hello["memory_mb"])
    tell({"ready": True})
    number = 0
    while line := requests.readline():
        done: list[tuple[str, float, str]] = []
        flushed = time.monotonic()
        try:
            rows = json.loads(line)
        except MemoryError:
            os._exit(1)
        for row in rows:
            began = time.monotonic()
            SINCE.pack_into(progress, NUMBER.size, began)  # before the number: a reader takes them the other way round
            NUMBER.pack_into(progress, 0, number)
            done.append((*_judge(verify, row), time.monotonic() - began))  # type: ignore[arg-type]
            number += 1
            if time.monotonic() - flushed > FLUSH_S:
                tell({"done": [(verdict, seconds, note) for verdict, note, seconds in done]})
                done, flushed = [], time.monotonic()
        NUMBER.pack_into(progress, 0, -1)
        tell({"done": [(verdict, seconds, note) for verdict, note, seconds in done]})


def _judge(verify: Any, row: list[str]) -> tuple[str, str]:
    """Verdict and note. Out of memory, the process ends: what is left of it is not to be trusted."""
    from cropi.rewards.verdicts import ERROR, Answered

    try:
        return verify(Answered(*row)), ""
    except MemoryError:
        os._exit(1)
    except BaseException as error:  # libraries raise timeouts and interrupts of their own
        return ERROR, f"{type(error).__name__}: {error}"[:500]


def _set_up(settings: dict[str, Any]) -> Any:
    from pydantic import TypeAdapter

    from cropi.config import Verifier
    from cropi.rewards.verifiers import verifier

    return verifier(TypeAdapter(Verifier).validate_python(settings))


def _limit_memory(megabytes: int) -> None:
    """That much address space beyond what is taken now, where the system can limit it."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return
    import resource

    taken = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + megabytes * 2**20,) * 2)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    main()
