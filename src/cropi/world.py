"""The processes that work on a run together. Free of torch: those of a launcher are `distributed.Launched`."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def launched() -> bool:
    """Whether `torchrun`, `accelerate launch` or the like has started this process as one of several."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def first() -> bool:
    """Whether this process is the one that speaks: the first of those that a launcher started, or the only one."""
    return not launched() or os.environ.get("RANK") == "0"


class OtherFailed(Exception):
    """Another process of the run has failed, and says why unless `why` does; this one has only to end."""

    def __init__(self, code: int, why: str = "") -> None:
        self.code, self.why = code, why
        super().__init__(code, why)


class World:
    """A process by itself, and what a process of several can ask of the others.

    What is asked is asked by all of them, in the same order. Files have one writer: the first process, or the one that
    a piece of the work has fallen to.
    """

    rank = 0
    size = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """This process's pieces of some work: every `size`-th."""
        return work[self.rank :: self.size]

    def titled(self, label: str) -> str:
        """A label for progress, which counts the first process's share."""
        return label if self.size == 1 else f"{label} (process 1 of {self.size})"

    def signed(self, text: str) -> str:
        """A message, with the process's name before it where that is not the first."""
        return text if self.is_main else f"[process {self.rank + 1} of {self.size} on {platform.node()}] {text}"

    def barrier(self) -> None:
        """Go on when all processes have come here."""

    def from_main(self, find: Callable[[], T]) -> T:
        """What the first process finds, a JSON value; the others wait for it, however long it takes."""
        return find()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        return [value]

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the sum over all processes, taken in float64, into tensors that all have by the same names and shapes."""

    def copy_main(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the first process's numbers into such tensors."""

    def connect(self, *, cpu: bool, timeout_s: float) -> None:
        """Make ready for `gather`, `add` and `copy_main`. `cpu`: their tensors are on no GPU."""

    def fail(self, code: int) -> bool:
        """Tell the others that this process ends with an error; whether it is the first, and so the one to say why."""
        return True

    def leave(self) -> None:
        """The work is done."""

    def facts(self) -> dict[str, Any]:
        """What a line of costs says of several processes."""
        return {} if self.size == 1 else {"processes": self.size}


ALONE = World()
