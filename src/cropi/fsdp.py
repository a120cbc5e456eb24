"""Forward passes of a policy whose parameters are sharded over ranks by torch's `fully_shard` (FSDP2).

A pass gathers whole parameters from all ranks, so all ranks must run the same number of passes. Sampling breaks that
rule: one rank has more prompts, or longer completions. Inside `in_lockstep` a rank that is done runs dummy passes.
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
