"""Scoring a policy whose parameters are sharded (FSDP2): the same scores, and how large a policy memory holds.

    python benchmarks/sharded.py --output sharded.json
    torchrun --nproc-per-node 2 benchmarks/sharded.py --output sharded.json
    python benchmarks/sharded.py --equal-shape tiny --shape tiny --device cpu --output sharded.json

Policies have random weights, made in the device's own memory; nothing is downloaded. Prompts are those of
`cropi bench engine`: 8 trajectories of 100 to 250 random tokens each, 45 % of the prompts without signal.

`equal`: one policy (bfloat16 on CUDA) is scored whole, once more whole, and sharded by `fully_shard`, layer by layer.
The second run says what the device's own order of sums is worth.
`large`: a policy is sharded and scored with the default projection. Printed are, of this process, the memory that its
weights take and the most that was allocated, and tokens that went through the policy per second. The validation sets
pass through the policy as often as `parts` says, since their dense gradients do not fit into memory together.

One JSON line each, as process 0 sees it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from cropi.gradients.groups import Group
from cropi.gradients.influence_scorer import BLOCK, Scorer
from cropi.lab.audit.agreement import spearman, top_overlap
from cropi.lab.bench.contenders import BY_WEIGHT, SETS, as_group
from cropi.lab.bench.machine import describe
from cropi.lab.bench.policy_shapes import SHAPES, random_policy
from cropi.lab.bench.workload import random_workload

GIB = 1 << 30


def join(device: str) -> DeviceMesh:
    """The processes that torchrun started, or this one alone."""
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        distributed.init_process_group(backend)
    else:
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device, (distributed.get_world_size(),))


def shard(policy: Any, mesh: DeviceMesh) -> nn.Module:
    """Layer by layer, and what remains as one."""
    for layer in policy.base_model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return fully_shard(policy, mesh=mesh)


def draw(shape: str, arguments: argparse.Namespace) -> tuple[list[Group], dict[str, list[Group]]]:
    """Train groups, and validation groups by set."""
    counts = {"prompts": arguments.prompts, "validation": arguments.validation, "seed": arguments.seed}
    workload = random_workload("realistic", **counts, vocabulary=SHAPES[shape].settings["vocab_size"])
    validation = [as_group(group) for group in workload.validation]
    return [as_group(group) for group in workload.train], {str(v): validation[v::SETS] for v in range(SETS)}


class Clock:
    """Seconds and the most memory of what happens between two calls."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self.lap()

    def lap(self) -> dict[str, float | None]:
        """Since the last one."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - getattr(self, "_start", 0.0)
        peak = torch.cuda.max_memory_allocated() / GIB if self._cuda else None
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()
        return {"seconds": round(seconds, 3), "peak_gib": None if peak is None else round(peak, 2)}


def score(policy: nn.Module, train: list[Group], validation: dict[str, list[Group]], device: str) -> dict[str, Any]:
    """Scores of this process's share of the train groups, and what they took."""
    clock = Clock(device)
    scorer = Scorer(policy, BY_WEIGHT)
    made = clock.lap()
    scorer.aim(validation)
    aimed = clock.lap()
    mine = train[distributed.get_rank() :: distributed.get_world_size()]
    with scorer.lockstep():
        blocks = [scorer(mine[start : start + BLOCK]) for start in range(0, len(mine), BLOCK)]
    scored = clock.lap()
    tokens = sum(block.tokens_computed for block in blocks)
    return {
        "values": np.concatenate([scorer.values(block) for block in blocks]),
        "made": made,
        "aimed": aimed | {"parts": scorer.direction_passes},
        "scored": scored | {"tokens_computed": tokens, "tokens_per_s": round(tokens / (scored["seconds"] or 1))},
    }


def agreement(found_NV: np.ndarray, expected_NV: np.ndarray) -> dict[str, Any]:
    """By the largest difference, relative to the largest influence; and of rankings on the first set."""
    gap = np.abs(found_NV - expected_NV).max(axis=0) / np.abs(expected_NV).max(axis=0)
    found_N, expected_N = found_NV[:, 0], expected_NV[:, 0]
    return {
        "largest_relative_difference": float(gap.max()),
        "spearman": spearman(found_N, expected_N),
        "same_of_best_tenth": top_overlap(found_N, expected_N, 0.1),
    }


def equal(arguments: argparse.Namespace, mesh: DeviceMesh) -> dict[str, Any]:
    """Whole twice, then sharded."""
    shape, device = arguments.equal_shape, arguments.device
    policy = random_policy(shape, dtype=arguments.dtype, device=device, seed=arguments.seed)
    train, validation = draw(shape, arguments)
    whole, again = (score(policy, train, validation, device) for _ in range(2))
    sharded = score(shard(policy, mesh), train, validation, device)
    return {
        "part": "equal",
        "shape": shape,
        "sharded_to_whole": agreement(sharded["values"], whole["values"]),
        "whole_to_whole": agreement(again["values"], whole["values"]),
        "seconds": {name: run["scored"]["seconds"] for name, run in (("whole", again), ("sharded", sharded))},
    }


def large(arguments: argparse.Namespace, mesh: DeviceMesh) -> dict[str, Any]:
    """Sharded, with what it takes."""
    shape, device = arguments.shape, arguments.device
    clock = Clock(device)
    policy = random_policy(shape, dtype=arguments.dtype, device=device, seed=arguments.seed)
    parameters = sum(p.numel() for p in policy.parameters())
    policy = shard(policy, mesh)
    held = sum(p.to_local().nbytes for p in policy.parameters())
    making = clock.lap()
    train, validation = draw(shape, arguments)
    run = score(policy, train, validation, device)
    values = run.pop("values")
    return {
        "part": "large",
        "shape": shape,
        "parameters": parameters,
        "processes": distributed.get_world_size(),
        "prompts": arguments.prompts,
        "trajectories": sum(len(group.completions) - 1 for group in train),  # without what carries the weights
        "weights_gib": round(held / GIB, 2),
        "policy_made": making,
        **run,
        "finite": bool(np.isfinite(values).all()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--equal-shape", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument("--shape", default="qwen2.5-7b", choices=SHAPES, help="of the part `large`")
    parser.add_argument("--parts", default="equal,large")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--validation", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.dtype = "bfloat16" if arguments.device == "cuda" else "float32"
    mesh = join(arguments.device)
    found: dict[str, Any] = {"environment": describe(arguments.device, torch.get_num_threads())}
    for name in arguments.parts.split(","):
        found[name] = {"equal": equal, "large": large}[name](arguments, mesh)
        if distributed.get_rank() == 0:
            print(json.dumps(found[name]), flush=True)
            arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        gc.collect()  # modules and FSDP's states hold one another
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
