"""Divide work: keep it in this process, or share it among ranks of torch.distributed.

`process_group()` is looked up where work is divided. It is this process alone until the command line calls
`start_ranks`. In a TRL script the trainer's ranks work together while it trains: `joined_ranks`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Timed out", "timed out")


def launched() -> bool:
    """Whether `torchrun`, `accelerate launch` or the like has started this process as one of several."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first_rank() -> bool:
    """Whether this process writes to the terminal: rank 0, or the only process."""
    return not launched() or os.environ.get("RANK") == "0"


def leave_launcher() -> None:
    """Make this process forget that a launcher has started it, for a command that one process runs."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


class ProcessGroup:
    """The process group; this class is the single-process case.

    Every method that exchanges data is collective: all ranks call it, in the same order. A file has one writer: rank 0,
    or the rank that its piece of work belongs to.
    """

    rank = 0
    size = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """This rank's share of some work: every `size`-th piece."""
        return work[self.rank :: self.size]

    def titled(self, label: str) -> str:
        """A label for a progress bar, which counts the share of rank 0."""
        return label if self.size == 1 else f"{label} (process 1 of {self.size})"

    def signed(self, text: str) -> str:
        """A message, with the name of the process before it unless that is rank 0."""
        return text if self.is_main else f"[process {self.rank + 1} of {self.size} on {platform.node()}] {text}"

    def barrier(self) -> None:
        """Wait until all ranks are here."""

    def from_main(self, find: Callable[[], T]) -> T:
        """The value that rank 0 finds."""
        return find()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order of rank."""
        return [value]

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace tensors by their sums over all ranks, computed in float64."""

    def copy_main(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace tensors by those of rank 0."""

    def fails_first(self) -> bool:
        """Whether no other rank has failed before, so that this one reports the error.

        Before a launcher's ranks have joined, one of each node reports.
        """
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def facts(self) -> dict[str, Any]:
        """The number of processes, for a line of the cost ledger."""
        return {} if self.size == 1 else {"processes": self.size}


class Ranks(ProcessGroup):
    """Ranks of torch.distributed: of a subgroup, or of the default group. `device` is where their tensors have to be.

    torch's own timeout ends a wait for a rank that is gone.
    """

    def __init__(self, subgroup: Any = None, device: Any = None) -> None:
        from torch import distributed

        self._torch, self._subgroup, self._device = distributed, subgroup, device
        self.rank, self.size = distributed.get_rank(subgroup), distributed.get_world_size(subgroup)

    def barrier(self) -> None:
        self.gather(None)

    def from_main(self, find: Callable[[], T]) -> T:
        found: list[Any] = [find() if self.is_main else None]
        self._torch.broadcast_object_list(found, group=self._subgroup, group_src=0)
        return found[0]

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        self._torch.all_gather_object(values, value, group=self._subgroup)
        return values

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        for name in sorted(tensors):
            wide = tensors[name].to(self._device or tensors[name].device).double()
            self._torch.all_reduce(wide, group=self._subgroup)
            tensors[name].copy_(wide)

    def copy_main(self, tensors: Mapping[str, Tensor]) -> None:
        for name in sorted(tensors):
            if tensors[name].numel():
                same = tensors[name].to(self._device or tensors[name].device).contiguous()
                self._torch.broadcast(same, group=self._subgroup, group_src=0)
                tensors[name].copy_(same)

    def fails_first(self) -> bool:
        from torch.distributed.distributed_c10d import _get_default_store

        try:
            return bool(_get_default_store().add("cropi/failures", 1) == 1)
        except RuntimeError:  # the node that holds the store is gone
            return os.environ.get("LOCAL_RANK") == "0"


_group = ProcessGroup()


def process_group() -> ProcessGroup:
    """The processes that work on this run."""
    return _group


def start_ranks(*, cpu: bool, timeout_s: float) -> None:
    """Join the processes of the launcher. `cpu`: their tensors are on no GPU. `timeout_s` bounds every wait.

    TRL trains in the same group. Objects travel through gloo on GPUs too, so that a lost rank is an error here and not
    the end of the process.
    """
    global _group
    import torch
    from accelerate import PartialState
    from torch import distributed

    on_gpu = torch.cuda.is_available() and not cpu
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=timeout_s)
    distributed.init_process_group("cuda:nccl,cpu:gloo" if on_gpu else "gloo", timeout=timeout)
    PartialState(cpu=not on_gpu)  # TRL's trainer asks it; it takes the group that exists
    _group = Ranks()


@contextmanager
def joined_ranks() -> Iterator[None]:
    """Work with the ranks that the trainer of a script has joined, until the end of the block."""
    global _group
    from torch import distributed

    before = _group
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        _group = Ranks()
    try:
        yield
    finally:
        _group = before


def end_ranks() -> None:
    """Leave the process group, once all ranks are done."""
    global _group
    if _group.size > 1:
        from torch import distributed

        _group.barrier()
        distributed.destroy_process_group()
        _group = ProcessGroup()


def is_lost_rank(error: Exception) -> bool:
    """Whether an error says that another rank has ended, or did not answer in time."""
    return _group.size > 1 and isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)
