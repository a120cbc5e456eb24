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

from cropi.rewards.verdicts import CORRECT, ERROR, Answered, Graded

NUMBER, SINCE = Struct("=q"), Struct("=d")  # in shared memory: which row it is at (-1: none), and since when
PROGRESS_FD = "CROPI_PROGRESS_FD"  # environment variable: the file of that memory
NEARLY = 2**25  # bytes that are left when memory counts as used up
FLUSH_S = 0.02  # answers wait for each other for so long


def main() -> None:
    """Serve until standard input ends."""
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    progress = mmap.mmap(int(os.environ[PROGRESS_FD]), NUMBER.size + SINCE.size)
    requests = os.fdopen(os.dup(0), "rb")  # ours alone: what a verifier starts finds nothing to read
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    me = os.getpid()

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
    ceiling = _limit_memory(hello["memory_mb"])
    tell({"ready": True})
    number = 0
    while line := requests.readline():
        done: list[tuple[str, float, str, float | None]] = []
        flushed = time.monotonic()
        try:
            rows = json.loads(line)
        except MemoryError:
            os._exit(1)
        for row in rows:
            began = time.monotonic()
            SINCE.pack_into(progress, NUMBER.size, began)  # before the number: a reader takes them the other way round
            NUMBER.pack_into(progress, 0, number)
            verdict, note, grade = _judge(verify, row)
            if os.getpid() != me:
                os._exit(0)  # a verifier has forked, and this is its child
            if (verdict != CORRECT or (grade is not None and grade < 1)) and _address_space() > ceiling:
                os._exit(1)  # a library may have caught that memory ran out, and said no
            done.append((verdict, time.monotonic() - began, note, grade))
            number += 1
            if time.monotonic() - flushed > FLUSH_S:
                tell({"done": done})
                done, flushed = [], time.monotonic()
        NUMBER.pack_into(progress, 0, -1)
        tell({"done": done})


def _judge(verify: Any, row: list[str]) -> tuple[str, str, float | None]:
    """Verdict, note and grade. Out of memory, the process ends: what is left of it is not to be trusted."""
    try:
        found = verify(Answered(*row))
        return (found.verdict, "", found.grade) if isinstance(found, Graded) else (found, "", None)
    except MemoryError:
        os._exit(1)
    except BaseException as error:  # libraries raise timeouts and interrupts of their own
        return ERROR, f"{type(error).__name__}: {error}"[:500], None


def _set_up(settings: dict[str, Any]) -> Any:
    from pydantic import TypeAdapter

    from cropi.config import Verifier
    from cropi.rewards.verifiers import verifier

    return verifier(TypeAdapter(Verifier).validate_python(settings))


STATM = Path("/proc/self/statm")


def _limit_memory(megabytes: int) -> float:
    """That much address space beyond what is taken now, where the system can limit it; returns what is nearly all."""
    if not STATM.exists():
        return float("inf")
    import resource

    taken, more = _address_space(), megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (taken + more,) * 2)
    return taken + more - min(NEARLY, more // 4)


def _address_space() -> int:
    return int(STATM.read_text().split()[0]) * os.sysconf("SC_PAGESIZE") if STATM.exists() else 0


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    main()
