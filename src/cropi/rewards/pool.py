"""A pool of worker processes that can be killed: no answer hangs, crashes or fills the memory of the caller.

Workers are `python -m cropi.rewards.pool_worker`. They are started anew, not forked, so they inherit no locks and run
none of the caller's code twice. Requests and answers are JSON lines over pipes. Each verdict is sent at once, so the
pool knows which row a worker is at, even one stuck in a C function. A worker that sends anything else is ended.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from cropi.console import warn
from cropi.errors import ConfigError
from cropi.rewards.pool_worker import END_S
from cropi.rewards.verifier import ERROR, TIMEOUT, VERDICTS, Answered, GradeError, Judge, Judgement, VerificationConfig
from cropi.rewards.verifiers import Verifier

CHUNK = 64  # rows sent to a worker at once, at most
CHUNK_CHARACTERS = 1_000_000  # and so much text of them, unless a single row has more
CACHED = 100_000  # judgements that are remembered
ATTEMPTS = 2  # of a row that ends its worker
START_S = 120.0  # for a process to import what its verifier needs
GRACE_S = 10.0  # beyond the time for a row: for reading a chunk, before its first row is begun
LONGEST = 2**20  # bytes of a message
_HERE = str(Path(__file__).parents[2])  # where this package is imported from
_Verdict = Annotated[str, Field(pattern=f"^({'|'.join(VERDICTS)})$")]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Grade = Annotated[float, Field(ge=0, le=1)]
_MESSAGE: TypeAdapter[tuple[Any, ...]] = TypeAdapter(
    tuple[Literal["ready", "begun"]]
    | tuple[Literal["failed"], str, str]
    | tuple[Literal["judged"], _Verdict, _Seconds, str, _Grade | None],
    config=ConfigDict(strict=True),
)


@dataclass
class _Job:
    """A row that waits for its verdict."""

    key: Hashable  # the same for rows that get one verdict
    row: Answered
    attempts: int = 0
    spared: int = 0  # times that a process ended before it had begun with this row


class _Worker:
    """One process, and the rows sent to it."""

    def __init__(self, spec: str, settings: VerificationConfig) -> None:
        self.jobs: deque[_Job] = deque()
        self.ready = False
        self.begun = False  # with the first of its rows
        self.judged = 0
        self.since = time.monotonic()  # the last start, sending or message
        self._token = secrets.token_hex(16)  # starts each of its messages, unlike output of verifiers
        self._partial, self._unsent = b"", memoryview(b"")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join([_HERE, *filter(None, [environment.get("PYTHONPATH")])])
        self.process = _started(environment)
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        path = [*sys.path, str(Path.cwd())]  # a user's functions are in the folder where the run starts
        hello = {"verifier": json.loads(spec), "memory_mb": settings.memory_mb, "path": path, "token": self._token}
        self._send(hello)

    def _send(self, message: Any) -> None:
        self._unsent = memoryview(json.dumps(message).encode() + b"\n")
        self.push()

    def push(self) -> bool:
        """Send as much as the pipe takes. Returns whether something is left."""
        assert self.process.stdin is not None
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self.process.stdin.fileno(), self._unsent) :]
        except BlockingIOError:
            return True
        except BrokenPipeError:  # it has died, which `read` reports
            self._unsent = memoryview(b"")
        return False

    def send(self, jobs: Sequence[_Job]) -> None:
        self.jobs.extend(jobs)
        self.begun, self.since = False, time.monotonic()
        self._send([list(job.row) for job in jobs])

    def read(self) -> Iterator[tuple[Any, ...]]:
        """Complete messages. EOFError if the process has ended, ValueError for anything but a message."""
        assert self.process.stdout is not None
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            raise EOFError
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            if not line.startswith(self._token.encode()):
                raise ValueError
            yield _MESSAGE.validate_json(line[len(self._token) :])
        if len(self._partial) > LONGEST:
            raise ValueError

    @property
    def gone(self) -> bool:
        """Whether it has ended. It is not reaped here, so its process id stays reserved."""
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def kill(self) -> None:
        """End the process and its children, through its keeper."""
        self.process.terminate()
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.wait(2 * END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()


def _started(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a worker that dies with this process.

    The system ends a worker with the *thread* that started it, so one thread, which never ends, starts them all.
    """
    return (
        _spawner()
        .submit(
            subprocess.Popen,
            [sys.executable, "-P", "-m", "cropi.rewards.pool_worker"],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C goes to the caller alone
        )
        .result()
    )


@cache
def _spawner() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="cropi-verifiers")


class Pool:
    """Judge rows by one verifier in processes that can be killed. They start at the first call.

    A row is tried again in a fresh process if it takes longer than `seconds`, or if its worker dies or needs more than
    `memory_mb` MiB beyond its start-up. After that it is judged `timeout` or `error`, and the pool goes on. Verdicts
    are cached, except for functions of the user. `counts` holds the rows by verdict, `kills` the ended processes.

    Errors: ConfigError if the verifier cannot be set up (a missing package, a function that cannot be imported).
    """

    def __init__(self, verifier: Verifier, settings: VerificationConfig) -> None:
        self._spec, self._settings = verifier.model_dump_json(), settings
        self._pure, self._known = verifier.pure, dict[Hashable, Judgement]()  # the oldest first
        self._workers: list[_Worker] = []
        self._failed_starts = 0  # in a row
        self._warned = False
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.kills = 0
        atexit.register(self.close)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        atexit.unregister(self.close)

    def close(self) -> None:
        """End all processes. The pool may be used again."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def __call__(self, rows: Sequence[Answered]) -> list[Judgement]:
        """Verdicts in the order of the rows."""
        with self._lock:
            keys: Sequence[Hashable] = [_key(row) for row in rows] if self._pure else range(len(rows))
            found: dict[Hashable, Judgement] = {key: self._known[key] for key in keys if key in self._known}
            new = {key: row for key, row in zip(keys, rows, strict=True) if key not in found}
            try:
                self._run(deque(_Job(key, row) for key, row in new.items()), found)
            except BaseException:
                self.close()
                raise
            if self._pure:
                self._known |= {key: found[key] for key in new if found[key].verdict != ERROR}  # may succeed next time
                for key in list(self._known)[:-CACHED]:
                    del self._known[key]
            judged = [found[key] for key in keys]
            self.counts.update(judgement.verdict for judgement in judged)
            self._warn_of_failure(judged)
            return judged

    def _warn_of_failure(self, judged: Sequence[Judgement]) -> None:
        """Warn once: a verifier that always fails would look like a policy that solves nothing.

        Not of grades out of range, with which a run ends.
        """
        notes = [judgement.note for judgement in judged if judgement.verdict in (ERROR, TIMEOUT)]
        failed = next((note for note in notes if not note.startswith(GradeError.__name__)), None)
        if failed is not None and not self._warned:
            self._warned = True
            warn(f"the verifier failed on a completion, which earns nothing: {failed} (reported once)")

    def _run(self, jobs: deque[_Job], found: dict[Hashable, Judgement]) -> None:
        wanted = len(found) + len(jobs)
        while len(found) < wanted:
            self._hand_out(jobs)
            busy = [worker for worker in self._workers if worker.jobs or not worker.ready]
            with selectors.DefaultSelector() as selector:
                for worker in busy:
                    assert worker.process.stdin is not None
                    assert worker.process.stdout is not None
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
                    if worker.push():
                        selector.register(worker.process.stdin, selectors.EVENT_WRITE)
                events = selector.select(min(0.05, self._settings.seconds / 10))
            now = time.monotonic()  # messages that arrive later are not read yet, so time after this does not count
            for event, _ in events:
                if event.data is not None:
                    self._listen(event.data, jobs, found)
            for worker in list(self._workers):
                self._watch(worker, now, jobs, found)

    def _hand_out(self, jobs: deque[_Job]) -> None:
        """Start processes for waiting rows, and send each idle one a chunk."""
        for worker in [one for one in self._workers if one.ready and not one.jobs and one.gone]:
            self._discard(worker)  # it ended while idle: no row is to blame
        if jobs and jobs[0].attempts:  # retry in a fresh process, without traces of other rows
            idle = [one for one in self._workers if not one.jobs]
            if idle and all(one.judged for one in idle):
                self._discard(idle[0])
        busy = sum(bool(worker.jobs) for worker in self._workers)
        while len(self._workers) < min(self._settings.processes, busy + len(jobs)):
            self._workers.append(_Worker(self._spec, self._settings))
        for worker in self._workers:
            if worker.ready and not worker.jobs and jobs and not (jobs[0].attempts and worker.judged):
                share = -(-len(jobs) // (2 * self._settings.processes))
                worker.send(_chunk(jobs, max(1, min(CHUNK, share))))

    def _listen(self, worker: _Worker, jobs: deque[_Job], found: dict[Hashable, Judgement]) -> None:
        try:
            for message in worker.read():
                worker.since = time.monotonic()
                self._take(worker, message, found)
        except EOFError:
            self._bury(worker, ERROR, "ended its process: out of memory, or a crash", jobs, found)
        except ValueError:
            self._bury(worker, ERROR, "wrote into the pipe in which verdicts are sent", jobs, found)

    def _take(self, worker: _Worker, message: tuple[Any, ...], found: dict[Hashable, Judgement]) -> None:
        """Act on a message. ValueError if it is out of turn."""
        match message:
            case ("failed", text, fix):
                raise ConfigError(f"the verifier cannot be set up: {text}", where="verifier", fix=fix)
            case ("ready",) if not worker.ready:
                worker.ready, self._failed_starts = True, 0
            case ("begun",) if worker.jobs and not worker.begun:
                worker.begun = True
            case ("judged", *judged) if worker.begun:
                found[worker.jobs.popleft().key] = Judgement(*judged)
                worker.judged += 1
                worker.begun = bool(worker.jobs)
            case _:
                raise ValueError

    def _discard(self, worker: _Worker) -> None:
        worker.kill()
        self._workers.remove(worker)

    def _watch(self, worker: _Worker, now: float, jobs: deque[_Job], found: dict[Hashable, Judgement]) -> None:
        """Kill a process that takes too long for one row."""
        waited = now - worker.since
        if not worker.ready:
            if waited > START_S:
                raise ConfigError(
                    f"a verifier process was not ready after {START_S:g} s",
                    where="verifier",
                    fix="check what importing the verifier does.",
                )
        elif worker.jobs and waited > self._settings.seconds + (0 if worker.begun else GRACE_S):
            self._bury(worker, TIMEOUT, "took too long", jobs, found)

    def _bury(
        self, worker: _Worker, verdict: str, note: str, jobs: deque[_Job], found: dict[Hashable, Judgement]
    ) -> None:
        """End a process. Its current row is to blame; the others of its chunk are sent again."""
        seconds = time.monotonic() - worker.since
        self._discard(worker)
        self.kills += 1
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts < ATTEMPTS:
                return
            raise ConfigError(
                f"a verifier process ended while it started (exit code {worker.process.returncode})",
                where="verifier",
                fix="run `python -m cropi.rewards.pool_worker` by hand to see why, or raise verification.memory_mb.",
            )
        if not worker.jobs:
            return
        first = worker.jobs[0]
        if not worker.begun and first.spared < ATTEMPTS:
            first.spared += 1
        else:
            first.attempts += 1
            if first.attempts == ATTEMPTS:
                found[worker.jobs.popleft().key] = Judgement(verdict, seconds, note)
                if self._pure:
                    self._known[first.key] = found[first.key]
        jobs.extendleft(reversed(worker.jobs))


def _chunk(jobs: deque[_Job], size: int) -> list[_Job]:
    """Take the next rows, at most `size`. A row that has ended a worker goes alone."""
    taken = [jobs.popleft()]
    characters = sum(map(len, taken[0].row))
    while jobs and len(taken) < size and not taken[0].attempts and not jobs[0].attempts:
        characters += sum(map(len, jobs[0].row))
        if characters > CHUNK_CHARACTERS:
            break
        taken.append(jobs.popleft())
    return taken


_POOLS: dict[tuple[str, str], Pool] = {}


def judge_of(verifier: Verifier, settings: VerificationConfig) -> Pool:
    """The pool of a verifier; there is one of each in this process."""
    key = verifier.model_dump_json(), settings.model_dump_json()
    if key not in _POOLS:
        _POOLS[key] = Pool(verifier, settings)
    return _POOLS[key]


def strict_judge(verifier: Verifier, settings: VerificationConfig) -> Judge:
    """The judge of a run. A grade outside [0, 1] is a ConfigError; counting it as 0 would punish the best answers."""
    pool = judge_of(verifier, settings)

    def judge(rows: Sequence[Answered]) -> list[Judgement]:
        judged = pool(rows)
        for judgement in judged:
            if judgement.note.startswith(GradeError.__name__):
                said = judgement.note.removeprefix(f"{GradeError.__name__}: ")
                raise ConfigError(said, where="verifier", fix="scale its value to [0, 1], or remove graded: true.")
        return judged

    return judge


def _key(row: Answered) -> bytes:
    return hashlib.blake2b(json.dumps(list(row)).encode(), digest_size=16).digest()
