"""Progress and messages on stderr: a bar per stage on a terminal, plain lines elsewhere. Results go to stdout.

Of the processes that a launcher has started, only the first prints.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol

from cropi.errors import printable
from cropi.parallel import is_first_rank

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

PLAIN_EVERY_S = 10.0  # at the most; a long stage says less often that it is still there
LINES_A_STAGE = 20
AVERAGED_S = 3600.0  # of the rate behind a bar's time left: pauses for evaluation and scoring belong to it


class Progress(Protocol):
    """Counts what is done."""

    done: int

    def advance(self, amount: int = 1) -> None: ...


@dataclass
class _Label:
    """Text beside a count, with the stage of several equal ones in which it stands."""

    text: str
    total: int
    stages: int

    def at(self, done: int) -> str:
        if self.stages == 1:
            return self.text
        return f"{self.text}  stage {min(done * self.stages // max(self.total, 1) + 1, self.stages)}/{self.stages}"


class _Bar:
    def __init__(self, bar: RichProgress, label: _Label, done: int) -> None:
        self._bar, self._label, self.done = bar, label, done
        self._task = bar.add_task(label.at(done), total=label.total, completed=done)

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        self._bar.update(self._task, advance=amount, description=self._label.at(self.done))


class _Lines:
    def __init__(self, label: _Label, unit: str, done: int) -> None:
        self._label, self._total, self._unit, self.done = label, label.total, unit, done
        self._start = self._said = time.monotonic()
        self._first: tuple[float, int] | None = None

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        now = time.monotonic()
        # The first piece is not timed: loading the policy and scoring a stage come before it.
        self._first = self._first or (now, self.done)
        quiet = max(PLAIN_EVERY_S, (now - self._start) / LINES_A_STAGE)
        if now - self._said >= quiet and self.done < self._total:
            self._said = now
            at = self._label.at(self.done)
            _print(f"{at}  {self.done}/{self._total} {self._unit}{self._left(now)}")

    def _left(self, now: float) -> str:
        """The time left, once a second piece has been timed."""
        assert self._first is not None
        since, done = self._first
        timed = self.done - done
        return f"  {duration((now - since) / timed * (self._total - self.done))} left" if timed else ""


@cache
def _terminal() -> Console | None:
    """The terminal on stderr, one for bars and lines alike so that neither overwrites the other; None elsewhere."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console  # imported here: `--help` draws nothing

    return Console(stderr=True)


_wording: Callable[[str], str] = str


@contextmanager
def worded(wording: Callable[[str], str]) -> Iterator[None]:
    """Pass every message printed inside the block through `wording`; what becomes empty is not printed."""
    global _wording
    before, _wording = _wording, wording
    try:
        yield
    finally:
        _wording = before


def _print(text: str, style: str | None = None) -> None:
    if not is_first_rank():
        return
    terminal, text = _terminal(), printable(_wording(text))
    if not text:
        return
    if terminal is None:
        print(text, file=sys.stderr, flush=True)
    else:
        terminal.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


WARNING = "warning: "


def say(text: str) -> None:
    """One line for the person watching."""
    _print(text)


def warn(text: str) -> None:
    """A likely mistake that does not stop the run."""
    _print(f"{WARNING}{text}", "yellow")


@cache
def warn_once(text: str) -> None:
    """A warning that would otherwise come back at every stage."""
    warn(text)


@contextmanager
def progress(label: str, total: int, unit: str, *, done: int = 0, stages: int = 1) -> Iterator[Progress]:
    """Show a bar with the time left on a terminal; elsewhere print a line now and then and one at the end.

    `done` pieces were finished by an earlier call and say nothing about the speed of this one. `stages`: so many equal
    stages make up the whole, and the present one is named.
    """
    start, named = time.monotonic(), _Label(label, total, stages)
    terminal = _terminal()
    if terminal is not None and is_first_rank():
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=terminal, transient=True, speed_estimate_period=AVERAGED_S) as bar:
            shown: Progress = _Bar(bar, named, done)
            yield shown
    else:
        yield (shown := _Lines(named, unit, done))
    _print(f"{label}  {shown.done} {unit}  {duration(time.monotonic() - start)}")


def counts_text(counts: Mapping[str, int]) -> str:
    """`ok 812 · no_signal 388`."""
    return " · ".join(f"{name} {count}" for name, count in counts.items())


def duration(seconds: float) -> str:
    """`1:02:03`, `2:03` or `4.1 s`."""
    if seconds != seconds:
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
