"""The processes that a launcher has started: `torchrun` or `accelerate launch`, on one node or several.

Waiting goes through the launcher's key-value store and takes as long as it must: a process that has failed says so
there, one that was killed is seen by its launcher, which ends the others of its node, and a node that is gone is missed
by `watch`. Tensors go through torch.distributed (gloo on CPUs, NCCL on GPUs), the same process group that TRL then
trains in.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as group
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from cropi.errors import ArtifactError
from cropi.watch import FAILED, LOST_S, STORE_GONE, Watch, tell_others
from cropi.world import OtherFailed, T, World

LONGEST_PAUSE_S = 0.2  # between two looks into the store
SHORT_PAUSE_S = 0.01
JOIN_S = 600.0  # that nodes may start apart


class Launched(World):
    """One of several processes."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        """`store` is a torch.distributed.Store that all processes see."""
        self.rank, self.size = rank, size
        self._asked = 0
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0  # others may start it and go
        self._watch: Watch | None = None
        self._name = meet(PrefixStore("cropi", store), rank, size)
        self._root: Any = store
        self._store: Any = PrefixStore(f"cropi/{self._name}", store)

    @classmethod
    def by_environment(cls) -> Launched:
        """As the launcher has put it into the environment."""
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_S)))
        return cls(store, rank, size)

    def barrier(self) -> None:
        key = self._come()
        self._wait(f"{key}/all")

    def from_main(self, find: Callable[[], T]) -> T:
        key = self._next()
        if self.is_main:
            made = json.dumps(find())
            with _answering():
                self._store.set(key, made)
        else:
            self._wait(key)
        with _answering():
            found: T = json.loads(self._store.get(key))
        return found

    def gather(self, value: T) -> list[T]:
        self.barrier()  # waits without an end, as a collective does not
        values: list[Any] = [None] * self.size
        group.all_gather_object(values, value)
        return values

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        self.barrier()
        for name in sorted(tensors):
            wide = tensors[name].double()
            group.all_reduce(wide)
            tensors[name].copy_(wide)

    def copy_main(self, tensors: Mapping[str, Tensor]) -> None:
        self.barrier()
        for name in sorted(tensors):
            if tensors[name].numel():
                same = tensors[name].contiguous()
                group.broadcast(same, src=0)
                tensors[name].copy_(same)

    def connect(self, *, cpu: bool, timeout_s: float) -> None:
        from accelerate import PartialState

        if not group.is_initialized():
            on_gpu = torch.cuda.is_available() and not cpu
            if on_gpu:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            group.init_process_group(
                "cuda:nccl,cpu:gloo" if on_gpu else "gloo",
                store=PrefixStore(f"group/{self._name}", self._root),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=timeout_s),
            )
        if self._watch is None:
            self._watch = Watch(self, self._store.clone(), self._launcher, min(LOST_S, timeout_s))
            self._watch.start()
        PartialState(
            cpu=cpu or not torch.cuda.is_available()
        )  # what TRL's trainer asks; it takes the group that there is

    def fail(self, code: int) -> bool:
        if self._watch:
            self._watch.stop()  # whatever it sees from here on has been said
        return tell_others(self._store, code)

    def leave(self) -> None:
        """All stay until all are done, each watched by another; the one that may hold the store goes last."""
        self.barrier()
        if self._watch and not self.is_main:
            self._watch.stop()
        key = self._come()
        if self.is_main:
            self._wait(f"{key}/all")
            if self._watch:
                self._watch.stop()
        if group.is_initialized():
            group.destroy_process_group()

    def _come(self) -> str:
        """Say that this process has come so far; the last one says that all have."""
        key = self._next()
        with _answering():
            if self._store.add(key, 1) == self.size:
                self._store.set(f"{key}/all", "1")
        return key

    def _next(self) -> str:
        self._asked += 1
        return str(self._asked)

    def _wait(self, key: str) -> None:
        pause = 0.001
        with _answering():
            while not self._store.check([key]):
                if self._store.check([FAILED]):
                    raise OtherFailed(int(self._store.get(FAILED)))
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)


@contextmanager
def _answering() -> Iterator[None]:
    """While the launcher's store is asked: it goes with the process that holds it."""
    try:
        yield
    except RuntimeError:
        raise OtherFailed(1, STORE_GONE) from None


def meet(store: Any, rank: int, size: int) -> str:
    """A name for these processes together, that no others have.

    A launcher that starts processes again may give them the store of those that died, with all that these have written,
    and no number of the attempt that is the same on all nodes. So each process calls out under a name of its own; the
    first answers every call that it finds with the name of all, until all have said by that name that they are here.
    The call of one that has died is answered in vain.
    """
    own, deadline, answered = uuid.uuid4().hex, time.monotonic() + JOIN_S, 0
    if rank:
        store.set(f"call/{store.add('calls', 1)}", own)
    while True:
        if rank and store.check([f"answer/{own}"]):
            name = str(store.get(f"answer/{own}").decode())
            store.set(f"here/{name}/{rank}", "1")
            return name
        if not rank:
            while store.check([f"call/{answered + 1}"]):
                answered += 1
                store.set(f"answer/{store.get(f'call/{answered}').decode()}", own)
            if all(store.check([f"here/{own}/{other}"]) for other in range(1, size)):
                return own
        if time.monotonic() > deadline:
            raise ArtifactError(
                f"process {rank + 1} of {size} has waited {JOIN_S:g} seconds for the others",
                where="the launcher",
                fix="look for the process that did not start.",
            )
        time.sleep(SHORT_PAUSE_S)
