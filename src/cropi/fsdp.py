"""Forward passes of a policy whose parameters are sharded over processes, as torch's `fully_shard` (FSDP2) leaves them.

A pass gathers whole parameters from all processes, so that all have to run as many. Sampling does not by itself: one
process has more prompts, or longer completions. Inside `in_lockstep` whoever is done takes part in what others do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

_together: WeakSet[nn.Module] = WeakSet()


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only a part of some parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def in_lockstep(model: nn.Module) -> Iterator[None]:
    """Run as many forward passes without gradients inside as need be, whatever other processes do with theirs: before
    each the processes agree, by one number, that there is one, and one that has left takes part with two tokens until
    all have. A block inside of another is part of it. Nothing happens where parameters are not sharded.

    All processes have to enter the same blocks in the same order, and nothing else that they do together may stand
    inside. A pass that runs out of memory cannot be repeated, since the others stand in the middle of it.
    """
    if model in _together or not is_sharded(model) or distributed.get_world_size() == 1:
        yield
        return
    # transformers' trainer lets `generate` gather the outermost parameters once for all passes, which not all begin
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
        for module in model.modules():  # torch keeps the parameters that a forward pass ends with
            if isinstance(module, FSDPModule):
                module.reshard()


def _note_pass(model: nn.Module) -> None:
    _agree(model, True)


@torch.no_grad()
def _join(model: nn.Module) -> None:
    """Take part in the passes of those that have not left."""
    was_training = model.training
    model.eval()
    ids_BT = torch.zeros(1, 2, dtype=torch.int64, device=_device(model))
    while _agree(model, False):
        model(input_ids=ids_BT, use_cache=False)
    model.train(was_training)


def _device(model: nn.Module) -> torch.device:
    return computed_on(next(parameter for parameter in model.parameters() if isinstance(parameter, DTensor)))


def _agree(model: nn.Module, wanted: bool) -> bool:
    """Whether any process wants a pass."""
    found = torch.tensor(int(wanted), device=_device(model))
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return bool(found)


def computed_on(part: DTensor) -> torch.device:
    """Where passes are computed: parameters may rest elsewhere."""
    kind = part.device_mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
