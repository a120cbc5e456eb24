"""The processes that a launcher has started: `torchrun` or `accelerate launch`, on one node or several.

Waiting goes through the launcher's key-value store and takes as long as it must: a process that has failed says so
there, and one that was killed is seen by the launcher, which ends the others. Tensors go through torch.distributed
(gloo on CPUs, NCCL on GPUs), the same process group that TRL then trains in.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as group
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from cropi.errors import ArtifactError
from cropi.world import OtherFailed, T, World

LONGEST_PAUSE_S = 0.2  # between two looks into the store
SHORT_PAUSE_S = 0.01
JOIN_S = 600.0  # that nodes may start apart
_FAILED = "failed"


class Launched(World):
    """One of several processes."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        """`store` is a torch.distributed.Store that all processes see."""
        self.rank, self.size = rank, size
        self._asked = 0
        self._name = meet(PrefixStore("cropi", store), rank, size)
        self._root, self._store = store, PrefixStore(f"cropi/{self._name}", store)

    @classmethod
    def by_environment(cls) -> Launched:
        """As the launcher has put it into the environment."""
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_S)))
        return cls(store, rank, size)

    def barrier(self) -> None:
        key = self._next()
        if self._store.add(key, 1) == self.size:
            self._store.set(f"{key}/all", "1")
        self._wait(f"{key}/all")

    def from_main(self, find: Callable[[], T]) -> T:
        key = self._next()
        if self.is_main:
            self._store.set(key, json.dumps(find()))
        else:
            self._wait(key)
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
        PartialState(
            cpu=cpu or not torch.cuda.is_available()
        )  # what TRL's trainer asks; it takes the group that there is

    def fail(self, code: int) -> bool:
        try:
            is_first = self._store.add("failures", 1) == 1
            self._store.set(_FAILED, str(code))
        except RuntimeError:  # the store went with the process that held it
            return False
        return is_first

    def leave(self) -> None:
        """The process that may hold the store goes last."""
        key = self._next()
        if self._store.add(key, 1) == self.size:
            self._store.set(f"{key}/all", "1")
        if self.is_main:
            self._wait(f"{key}/all")
        if group.is_initialized():
            group.destroy_process_group()

    def _next(self) -> str:
        self._asked += 1
        return str(self._asked)

    def _wait(self, key: str) -> None:
        pause = 0.001
        while not self._there(key):
            if self._there(_FAILED):
                raise OtherFailed(int(self._store.get(_FAILED)))
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _there(self, key: str) -> bool:
        try:
            return bool(self._store.check([key]))
        except RuntimeError:  # as in `fail`
            raise OtherFailed(1) from None


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
