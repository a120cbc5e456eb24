"""The process in which a verifier runs: `python -m cropi.rewards.pool_worker`, started and watched by `Pool`.

It reads one JSON line that names the verifier, then lists of rows. It answers in lines of a secret token and a JSON
list: it is ready, it has begun with a list, each verdict as soon as it is known. Output of verifiers goes to standard
error. Its parent, the keeper, ends all children of the verifier when the worker or the pool ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cropi.rewards.verifier import CORRECT, ERROR, Answered, Graded
from cropi.rewards.verifiers import Verifier

NEARLY = 2**25  # bytes left when memory counts as used up
END_S = 5.0  # for all children of a verifier to end
NOTE = 500  # characters of a note
_DEATH, _SUBREAPER = 1, 36  # of Linux's prctl


def main() -> None:
    """Fork into keeper and worker."""
    _prctl(_DEATH, signal.SIGTERM)
    _prctl(_SUBREAPER, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent that ignores it passes that on
    heard = {signal.SIGCHLD, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    if worker := os.fork():
        _keep(worker, heard)
    _prctl(_DEATH, signal.SIGKILL)
    os.setsid()  # a signal to its own group does not reach the keeper
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _serve()


def _keep(worker: int, heard: set[signal.Signals]) -> None:
    """Wait for the worker's end or SIGTERM, end all children, and exit with the worker's status."""
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # leave the pipes to the worker, so the pool sees when it closes them
    os.dup2(nothing, 1)
    status = None
    while status is None and signal.sigwait(heard) == signal.SIGCHLD:
        status = _reaped(worker)
    if status is None:
        os.kill(worker, signal.SIGKILL)
        status = os.waitpid(worker, 0)[1]
    until = time.monotonic() + END_S
    with suppress(ChildProcessError):  # none is left
        while time.monotonic() < until:  # orphans become children of the keeper
            if not os.waitpid(-1, os.WNOHANG)[0]:
                _kill_children()
    os._exit(abs(os.waitstatus_to_exitcode(status)))


def _reaped(worker: int) -> int | None:
    """Reap all children that have ended; returns the worker's status if it is among them."""
    status = None
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            status = found[1] if found[0] == worker else status
    return status


def _kill_children() -> None:
    import psutil

    for child in psutil.Process().children():
        with suppress(psutil.Error):
            child.kill()
    time.sleep(0.001)  # they need a moment to end


def _serve() -> None:
    """Judge until standard input ends."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), "rb")  # children of a verifier find nothing to read
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    me = os.getpid()
    hello = json.loads(requests.readline())
    token = hello["token"].encode()

    def tell(*message: Any) -> None:
        data = token + json.dumps(message).encode() + b"\n"
        try:
            while data:
                data = data[answers.write(data) :]
        except OSError:
            os._exit(1)  # a verifier has closed the pipe

    sys.path[:] = hello["path"]
    try:
        verify = TypeAdapter[Verifier](Verifier).validate_python(hello["verifier"]).load()
    except Exception as error:
        fix = "check the verifier's settings, and that its packages are installed here."
        tell("failed", _note(error), fix)
        return
    ceiling = _limit_memory(hello["memory_mb"])
    tell("ready")
    while line := requests.readline():
        try:
            rows = json.loads(line)
        except MemoryError:
            os._exit(1)
        tell("begun")
        for row in rows:
            began = time.monotonic()
            verdict, note, grade = _judge(verify, row)
            if os.getpid() != me:
                os._exit(0)  # a verifier has forked, and this is its child
            if (verdict != CORRECT or (grade is not None and grade < 1)) and _address_space() > ceiling:
                os._exit(1)  # a library may have caught a MemoryError and answered "wrong"
            tell("judged", verdict, time.monotonic() - began, note, grade)


def _note(error: BaseException) -> str:
    """The exception as encodable text: it may hold half a surrogate pair."""
    return f"{type(error).__name__}: {error}"[:NOTE].encode(errors="replace").decode()


def _judge(verify: Any, row: list[str]) -> tuple[str, str, float | None]:
    """Verdict, note and grade. The process ends when memory runs out: its state cannot be trusted then."""
    try:
        found = verify(Answered(*row))
        return (found.verdict, "", found.grade) if isinstance(found, Graded) else (found, "", None)
    except MemoryError:
        os._exit(1)
    except BaseException as error:  # libraries raise their own timeouts and interrupts
        return ERROR, _note(error), None


STATM = Path("/proc/self/statm")


def _limit_memory(megabytes: int) -> float:
    """Limit further address space, if the system can. Returns the size that counts as nearly used up."""
    if not STATM.exists():
        return float("inf")
    import resource

    taken, more = _address_space(), megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (taken + more,) * 2)
    return taken + more - min(NEARLY, more // 4)


def _address_space() -> int:
    return int(STATM.read_text().split()[0]) * os.sysconf("SC_PAGESIZE") if STATM.exists() else 0


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


if __name__ == "__main__":
    main()
