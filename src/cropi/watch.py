"""What a process of several cannot learn by waiting: that another's node is gone, or that its own launcher is.

A thread in each process says in the launcher's store that the process lives, and looks whether the next one has said
so, the last looking at the first. So at least one process of a node that is gone is looked at from another node.
"""

from __future__ import annotations

import atexit
import math
import os
import platform
import sys
import threading
from collections.abc import Callable
from typing import Any

from cropi.errors import printable
from cropi.world import World

BEAT_S = 2.0
LOST_S = 300.0  # of silence; much longer than one call that keeps Python's other threads from running
FAILED = "failed"
_FIX = "Fix: run the same command again: it goes on."
STORE_GONE = f"the launcher's store cannot be reached: the node that holds it is gone\n{_FIX}"
STORE_SILENT = f"the launcher's store does not answer: the node that holds it is gone or stands still\n{_FIX}"


def tell_others(store: Any, code: int) -> bool:
    """Leave word of a failure in the store; whether this process has to say why.

    That is the first to fail. Where the store went with the node that held it, it is one of each node.
    """
    try:
        is_first = bool(store.add("failures", 1) == 1)
        store.set(FAILED, str(code))
    except RuntimeError:
        return _speaks_for_node()
    return is_first


def _speaks_for_node() -> bool:
    """Whether this process is the one that says what all of its node see."""
    return os.environ.get("LOCAL_RANK") == "0"


def end_process(text: str) -> None:
    """End this process with a message, whatever its other threads stand in."""
    try:
        if text:
            print(printable(text), file=sys.stderr, flush=True)
    finally:
        os._exit(1)


class Watch:
    """The thread of one process, and another that sees when the first is kept by a store that does not answer."""

    def __init__(
        self, world: World, store: Any, launcher: int, lost_s: float, end: Callable[[str], None] = end_process
    ) -> None:
        """`store`: a connection of its own, since one that another thread uses may be held by it. `launcher`: its
        process id, 0 where it need not be this one's parent. `lost_s`: how long another may be silent."""
        self._world, self._store, self._launcher, self._end = world, store, launcher, end
        self._lost_s, self._looks = lost_s, math.ceil(lost_s / BEAT_S)
        self._next = (world.rank + 1) % world.size
        self._beats, self._heard, self._silent = 0, "", 0
        self._looked = 0
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=run, name="watch", daemon=True) for run in (self._run, self._see_that_it_looks)
        ]

    def start(self) -> None:
        """Begin; the end of the process ends it before the interpreter's own end, which it must not meet."""
        for thread in self._threads:
            thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Look no more: the work is done."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=BEAT_S)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._look()
            except RuntimeError:  # the connection is broken
                self._leave(STORE_GONE)
            self._looked += 1
            self._stopped.wait(BEAT_S)

    def _see_that_it_looks(self) -> None:
        """A connection that does not break is waited for without end, by the other thread."""
        before, missed = -1, 0
        while not self._stopped.wait(BEAT_S):
            missed = 0 if self._looked != before else missed + 1
            before = self._looked
            if missed >= self._looks:
                self._stopped.set()  # the store, which the others would hear of it by, is not asked
                self._end(self._world.signed(f"error: {STORE_SILENT}") if _speaks_for_node() else "")

    def _look(self) -> None:
        if self._launcher and os.getppid() != self._launcher:  # first, since the store may be gone with it
            self._leave(f"the launcher that started this process is gone\n{_FIX}")
            return
        self._beats += 1
        self._store.set(f"alive/{self._world.rank}", f"{self._beats} {platform.node()}")
        if not self._store.check([FAILED]):
            self._listen(f"alive/{self._next}")

    def _listen(self, key: str) -> None:
        """Silence is counted in looks, not by a clock that goes on where this process itself stands still."""
        heard = self._store.get(key).decode() if self._store.check([key]) else ""
        self._silent = 0 if heard != self._heard else self._silent + 1
        self._heard = heard
        if self._silent >= self._looks:
            name = f"process {self._next + 1} of {self._world.size}"
            where = f"{name} on {heard.partition(' ')[2]}" if heard else name
            self._leave(f"nothing was heard of {where} for {self._lost_s:g} seconds: it or its node is gone\n{_FIX}")

    def _leave(self, what: str) -> None:
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._end(self._world.signed(f"error: {what}") if tell_others(self._store, 1) else "")
