"""Policies whose parameters are sharded over ranks by torch's `fully_shard` (FSDP2).

Outside a pass each rank holds a shard of every parameter (a DTensor). In a pass, a module's parameters are gathered
from all ranks just before its call and released just after, so all ranks must run the same passes in the same order. A
rank with nothing to compute runs a pass of two tokens: forward alone to sample, inside `in_lockstep`; also backward to
score, where the engine asks `ShardedParameters` what the others do. Scoring forms no weight gradient by autograd, so
none is reduced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cropi.errors import PolicyError
from cropi.parallel import ProcessGroup, Ranks, process_group

_together: WeakSet[nn.Module] = WeakSet()


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds only a part of some parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def in_lockstep(model: nn.Module) -> Iterator[None]:
    """Let each rank run any number of forward passes without gradients inside the block.

    Before each pass the ranks agree, by one number, that there is one. A rank that has left the block runs passes of
    two tokens until all have left. A nested block belongs to the outer one. Without sharding this does nothing.

    All ranks enter the same blocks in the same order, with no other collective inside. A pass that runs out of memory
    cannot be repeated, since the other ranks are in the middle of it.
    """
    if model in _together or not is_sharded(model) or distributed.get_world_size() == 1:
        yield
        return
    # transformers' trainer makes `generate` gather the outermost parameters before its passes, which some ranks skip
    generate = model.__dict__.pop("generate", None)
    before_pass = model.register_forward_pre_hook(lambda *_: _note_pass(model), prepend=True)
    _together.add(model)
    try:
        yield
        before_pass.remove()
        _join(model)
    finally:
        before_pass.remove()
        _together.discard(model)
        if generate is not None:
            model.generate = generate
        for module in model.modules():  # torch keeps the last parameters of a forward pass whole
            if isinstance(module, FSDPModule):
                module.reshard()


def _note_pass(model: nn.Module) -> None:
    _agree(model, True)


@torch.no_grad()
def _join(model: nn.Module) -> None:
    """Run dummy passes until all ranks have left the block."""
    was_training = model.training
    model.eval()
    ids_BT = torch.zeros(1, 2, dtype=torch.int64, device=_device(model))
    while _agree(model, False):
        model(input_ids=ids_BT, use_cache=False)
    model.train(was_training)


def _device(model: nn.Module) -> torch.device:
    return computed_on(next(parameter for parameter in model.parameters() if isinstance(parameter, DTensor)))


def _agree(model: nn.Module, wanted: bool) -> bool:
    """Whether any rank wants a pass."""
    found = torch.tensor(int(wanted), device=_device(model))
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return bool(found)


def computed_on(part: DTensor) -> torch.device:
    """The device that computes passes; parameters may be offloaded to another."""
    kind = part.device_mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


# -- scoring -------------------------------------------------------------------------------------------------------


class Turn(IntEnum):
    """The next pass of a process. If processes differ, all do the greatest."""

    NOTHING = 0
    FORWARD = 1
    BACKWARD = 2  # forward and backward


class ShardedParameters:
    """Sharding of one model's parameters over processes; a single process if they are not sharded."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        parts = [p for p in model.parameters() if isinstance(p, DTensor)]
        if parts and not self._modules:
            raise _not_covered("it holds DTensors that fully_shard did not make")
        self.sharded = bool(self._modules)
        self._group, self.device = None, next(model.parameters()).device
        self.rank, self.count = 0, 1
        if not parts:
            return
        groups = {_group_of(part) for part in parts}
        if len(groups) > 1:
            raise _not_covered("its parameters are spread over different sets of processes")
        self._group = groups.pop()
        self.rank, self.count = distributed.get_rank(self._group), distributed.get_world_size(self._group)
        self.device = computed_on(parts[0])

    def agree(self, turn: Turn) -> Turn:
        """Return the greatest turn that any process wants next."""
        return Turn(self._agreed(turn, distributed.ReduceOp.MAX))

    def least(self, number: int) -> int:
        """Return the smallest number of all processes."""
        return self._agreed(number, distributed.ReduceOp.MIN)

    def _agreed(self, own: int, operation: Any) -> int:
        if self.count == 1:
            return own
        found = torch.tensor([own], device=self.device)
        distributed.all_reduce(found, operation, group=self._group)
        return int(found)

    def ranks(self) -> ProcessGroup:
        """Return the process group of the run, or the ranks that hold the parameters if the run has none."""
        known = process_group()
        return known if known.size > 1 or self._group is None else Ranks(self._group, self.device)

    @contextmanager
    def gathered(self, model: nn.Module, path: str) -> Iterator[None]:
        """Gather the own parameters of the module at a path inside the block."""
        steps = path.split(".") if path else []
        above = [model.get_submodule(".".join(steps[:depth])) for depth in range(len(steps) + 1)]
        unit = next((module for module in reversed(above) if isinstance(module, FSDPModule)), None)
        if unit is None:
            yield
            return
        unit.unshard()
        try:
            yield
        finally:
            unit.reshard()

    def release(self) -> None:
        """Release gathered parameters: torch keeps those of the outermost module after a forward pass."""
        for unit in self._modules:
            unit.reshard()


def _group_of(part: DTensor) -> Any:
    """Return the process group that a parameter is sharded over, ignoring replicas from hybrid sharding."""
    dims = [dim for dim, placement in enumerate(part.placements) if placement.is_shard()]
    if len(dims) != 1:
        raise _not_covered("its parameters are sharded along several dimensions of the device mesh, or along none")
    return part.device_mesh.get_group(dims[0])


def _not_covered(why: str) -> PolicyError:
    return PolicyError(
        f"the policy's sharded parameters cannot be scored: {why}",
        where="policy",
        fix="shard it with fully_shard (FSDP2) alone, over one dimension of a device mesh.",
    )


def outline(parameter: Tensor, device: torch.device) -> Tensor:
    """Return an empty-memory tensor of a sharded parameter's full shape and dtype; other parameters as they are."""
    if not isinstance(parameter, DTensor):
        return parameter
    return torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)


@contextmanager
def forward_replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """Replace a module's forward inside the block. Its hooks, by which FSDP gathers parameters, stay."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
