"""Influence and directions read by two processes, with weights copied (DDP) or sharded (FSDP2), are those of one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests.gradients.architectures import BUILDERS, draw_group
from tests.gradients.ranks import as_accelerate_does, by_blocks, by_modules
from tests.gradients.test_reading import WEIGHTS, directions_for, loss_of_rows, rows_of_tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from cropi import parallel
from cropi.gradients.groups import SurrogateSettings
from cropi.gradients.training_influence import Reader
from cropi.parallel import ProcessGroup, Ranks
from cropi.rollouts.generation import Sampling
from cropi.stages.validation_pass import SampledGroup, ValidationPass


def read(trained: nn.Module, model: nn.Module, directions: Any, rows: Tensor) -> dict[str, Any]:
    """What a training pass gives, and the gradient after it."""
    ids, mask = rows_of_tokens()
    reader = Reader(model, directions)
    with reader.reading(rows, model):
        loss_of_rows(trained, ids[rows], mask[rows], WEIGHTS[rows]).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
    return {"values": reader.take()[1], "check": reader.exclude_unfaithful(), "gradients": whole}


def directed(model: Any) -> dict[str, Any]:
    """Three rounds of validation groups: five members of uneven lengths, in micro-batches that two ranks share."""
    settings = SurrogateSettings(normalizer="constant", max_completion_length=12)
    sampling = Sampling(12, 1.0)
    made: Any = ValidationPass({}, sampling, settings, 25, lambda *_: 0)
    given = []
    for seed in range(3):
        drawn = [draw_group(3 + n, [2 + n, 5, 9 - n], seed=10 * seed + n) for n in range(5)]
        groups = [SampledGroup(n, g.prompt_ids, g.completions, g.rewards) for n, g in enumerate(drawn)]
        given.append(made.differentiate(model, {"one": groups, "none": []}))
    return {"given": given, "sums": made.sketches["one"].sums(), "norm": made.directions["one"].norm}


def found(policy: str, style: Any, mesh: DeviceMesh | None) -> dict[str, Any]:
    model: Any = BUILDERS[policy]().float()
    directions = directions_for(model, rank=3)
    if style is not None and mesh is not None:
        style(model, mesh)
    trained = DistributedDataParallel(model) if style is None and mesh is not None else model
    rows = torch.arange(4) if mesh is None else torch.arange(4).chunk(2)[mesh.get_rank()]
    parallel._group = ProcessGroup() if mesh is None else Ranks()
    try:
        direction = directed(model)
        assert all(p.grad is None for p in model.parameters())
        return direction | read(trained, model, directions, rows)
    finally:
        parallel._group = ProcessGroup()


STYLES = {"ddp": None, "blocks": by_blocks, "accelerate": as_accelerate_does, "modules": by_modules}
READ = [(policy, style) for policy in ("llama", "llama_tied", "gpt_neox") for style in STYLES]
CASES: dict[str, Callable[[DeviceMesh], Any]] = {
    f"read/{policy}/{style}": partial(found, policy, STYLES[style]) for policy, style in READ
}


@pytest.mark.parametrize(("policy", "style"), READ)
def test_two_processes_find_what_one_does(policy: str, style: str, of_two: Callable[[str], list[Any]]) -> None:
    one, ranks = found(policy, None, None), of_two(f"read/{policy}/{style}")
    torch.testing.assert_close(torch.cat([part["values"] for part in ranks]), one["values"], rtol=5e-5, atol=5e-5)
    for part in ranks:
        wrong, share = part["check"]
        assert wrong == []
        assert share == pytest.approx(1)
        for name, gradient in one["gradients"].items():  # mean over processes, not the sum
            torch.testing.assert_close(part["gradients"][name] * 2, gradient, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(part["sums"], one["sums"], rtol=1e-4, atol=1e-5)
        for (given, *spent), (expected, *counted) in zip(part["given"], one["given"], strict=True):
            assert spent == counted  # tokens and multiply-adds
            assert given["one"].keys() == expected["one"].keys()
            for member, halves in expected["one"].items():
                assert given["one"][member] == pytest.approx(halves, rel=1e-4, abs=1e-6)
    assert ranks[0]["given"] == ranks[1]["given"]
    assert all(torch.equal(ranks[0]["sums"][name], ranks[1]["sums"][name]) for name in one["sums"])
