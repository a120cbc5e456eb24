"""Models sharded over processes, and processes to shard them over."""

from __future__ import annotations

import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

Case = Callable[[DeviceMesh], Any]


def _settings(mesh: DeviceMesh, policy: MixedPrecisionPolicy | None) -> dict[str, Any]:
    """Of `fully_shard`."""
    rounding = {} if policy is None else {"mp_policy": policy}
    return {"mesh": mesh, "reshard_after_forward": True, **rounding}


def by_blocks(model: Any, mesh: DeviceMesh, policy: MixedPrecisionPolicy | None = None) -> Any:
    """Each layer by itself, and what is left."""
    settings = _settings(mesh, policy)
    for layer in _causal_lm(model).base_model.layers:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def by_modules(model: Any, mesh: DeviceMesh, policy: MixedPrecisionPolicy | None = None) -> Any:
    """Every module by itself that has a parameter of its own, one, and shares it with no other."""
    settings = _settings(mesh, policy)
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for module in list(model.modules()):
        own = [p for p in module._parameters.values() if p is not None]
        if len(own) == 1 and holders[id(own[0])] == 1:
            fully_shard(module, **settings)
    return fully_shard(model, **settings)


def as_accelerate_does(model: Any, mesh: DeviceMesh, policy: MixedPrecisionPolicy | None = None) -> Any:
    """The embedding by itself as well, or, where the head is tied to it, with the last norm and the head."""
    settings = _settings(mesh, policy)
    causal_lm = _causal_lm(model)
    first, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    last = getattr(causal_lm.base_model, "norm", None) or causal_lm.base_model.final_layer_norm
    for layer in causal_lm.base_model.layers:
        fully_shard(layer, **settings)
    tied = first.weight is head.weight
    if not tied:
        fully_shard(first, **settings)
    fully_shard([last, first, head] if tied else [last, head], **settings | {"reshard_after_forward": False})
    del settings["reshard_after_forward"]
    return fully_shard(model, **settings)


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def whole_numbers(model: nn.Module) -> int:
    """How many numbers of the parameters are in this process's memory."""
    local = (p.to_local() if isinstance(p, distributed.tensor.DTensor) else p for p in model.parameters())
    return sum(part.numel() for part in local)


@contextmanager
def processes(rank: int, count: int, folder: Path) -> Iterator[DeviceMesh]:
    """This process as one of several."""
    store = distributed.FileStore(str(folder / "store"), count)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=300))
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        distributed.destroy_process_group()


def run_on_processes(cases: Sequence[Case], count: int) -> list[list[Any]]:
    """What each case gives in each of so many processes; text where it raised."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run, (cases, count, folder), nprocs=count)
        found = [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(count)]
    return [list(by_rank) for by_rank in zip(*found, strict=True)]


def _run(rank: int, cases: Sequence[Case], count: int, folder: str) -> None:
    torch.set_num_threads(1)
    found = []
    with processes(rank, count, Path(folder)) as mesh:
        for case in cases:
            try:
                found.append(case(mesh))
            except Exception:
                found.append(traceback.format_exc())
    torch.save(found, Path(folder) / str(rank))
