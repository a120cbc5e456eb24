"""Cost of reading influence while a policy trains, and what a direction of low rank keeps of it.

    python benchmarks/reading.py cost --model builtin --sets 4
    python benchmarks/reading.py cost --model FOLDER --rows 16 --tokens 80 --bf16
    python benchmarks/reading.py memory --model builtin --sets 4
    python benchmarks/reading.py fidelity --model builtin

`cost`: a forward and backward pass over the same rows with and without reading, alternately in one process; prints the
median ratio of the seconds and its range. Every set has two directions, of its two halves. `memory`: the peak of the
resident memory of such passes, with weights and gradients, each kind in a process of its own (on Linux); what the
process had before it loaded the model is left out. `fidelity`: Pearson and Spearman correlation over rows of <G, D_r>
with <G, D> of the whole direction, for r = 4 to 64. Tokens, advantages and directions are of random rows: for cost they
do not matter; fidelity is that of the gradients of such rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cropi.config import PolicyConfig
from cropi.gradients.direction import DirectionSketch, backward_to_embeddings
from cropi.gradients.training_influence import Direction, LowRank, Reader
from cropi.lab.audit.agreement import pearson, spearman
from cropi.policy import load_policy

RANKS = (4, 8, 16, 32, 64)
ROUNDS = 7  # the first is left out
MEMORY_ROUNDS = 3


def random_rows(model: Any, rows: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids and advantages."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.config.vocab_size, (rows, tokens), generator=generator)
    return ids, torch.randn(rows, generator=generator)


def loss_of(model: nn.Module, ids: Tensor, advantages: Tensor, *, bf16: bool) -> Tensor:
    """sum_k A_k sum_t log pi(x_t) over the second half of each row."""
    own = ids.shape[1] // 2
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids, logits_to_keep=own + 1, use_cache=False).logits[:, :-1]
    chosen = logits.float().log_softmax(-1).gather(2, ids[:, -own:, None])[..., 0]
    return (chosen * advantages[:, None]).sum()


def directions_of(
    model: Any, sketch: DirectionSketch, rows: int, tokens: int, seed: int, bf16: bool
) -> list[Direction]:
    """Two halves of a direction from random rows."""
    ids, advantages = random_rows(model, rows, tokens, seed)
    with backward_to_embeddings(model) as backward, sketch.sketching(torch.arange(rows) % 2):
        backward(loss_of(model, ids, advantages, bf16=bf16))
    return sketch.directions()


def cost(arguments: argparse.Namespace) -> dict[str, Any]:
    model: Any = load_policy(PolicyConfig(path=arguments.model)).model
    found: list[Direction] = []
    for number in range(arguments.sets):
        sketch = DirectionSketch(model, arguments.rank)
        found += directions_of(model, sketch, 8, arguments.tokens, 100 + number, arguments.bf16)
    reader = Reader(model, found)
    ids, advantages = random_rows(model, arguments.rows, arguments.tokens, 0)

    def passed(reads: bool) -> float:
        model.zero_grad()
        start = time.perf_counter()
        if reads:
            with reader.reading(torch.arange(len(ids))):
                loss_of(model, ids, advantages, bf16=arguments.bf16).backward()
        else:
            loss_of(model, ids, advantages, bf16=arguments.bf16).backward()
        return time.perf_counter() - start

    pairs = [(passed(True), passed(False)) for _ in range(ROUNDS)][1:]
    ratios = sorted(reading / plain for reading, plain in pairs)
    with reader.reading(torch.arange(len(ids)), model):
        loss_of(model, ids, advantages, bf16=arguments.bf16).backward()
    return {
        "model": arguments.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sets": arguments.sets,
        "rank": arguments.rank,
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "share_read": round(reader.exclude_unfaithful()[1], 4),
    }


def peak(arguments: argparse.Namespace, reads: bool) -> int:
    """Bytes of two passes, weights, gradients and what reading keeps, at their most in this process."""
    torch.set_num_threads(1)
    before = most_resident()
    model: Any = load_policy(PolicyConfig(path=arguments.model)).model
    reader = Reader(model, [random_direction(model, arguments.rank) for _ in range(2 * arguments.sets * reads)])
    ids, advantages = random_rows(model, arguments.rows, arguments.tokens, 0)
    for _ in range(2):
        with reader.reading(torch.arange(len(ids))):
            loss_of(model, ids, advantages, bf16=arguments.bf16).backward()
    return most_resident() - before


def most_resident() -> int:
    """The most bytes that this process has had. `ru_maxrss` would include those of the process that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def random_direction(model: nn.Module, rank: int) -> Direction:
    return {
        name: torch.randn(p.shape)
        if p.dim() == 1
        else LowRank(torch.randn(len(p), rank), torch.randn(rank, p.shape[1]))
        for name, p in model.named_parameters()
    }


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)  # what is freed goes back at once, whatever was freed before
    spawned = multiprocessing.get_context("spawn")

    def measured(reads: bool) -> int:
        with ProcessPoolExecutor(1, mp_context=spawned) as processes:
            return processes.submit(peak, arguments, reads).result()

    pairs = [(measured(True), measured(False)) for _ in range(MEMORY_ROUNDS)]
    ratios = sorted(reading / plain for reading, plain in pairs)
    return {
        "model": arguments.model,
        "sets": arguments.sets,
        "rank": arguments.rank,
        "plain_mib": round(statistics.median(plain for _, plain in pairs) / 2**20),
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(ratios[0], 3), round(ratios[-1], 3)],
    }


def fidelity(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    model: Any = load_policy(PolicyConfig(path=arguments.model)).model
    ids, advantages = random_rows(model, arguments.rows, arguments.tokens, 0)

    def read(rank: int) -> Any:
        sketch = DirectionSketch(model, rank)
        reader = Reader(model, directions_of(model, sketch, 32, arguments.tokens, 100, arguments.bf16))
        with reader.reading(torch.arange(len(ids))):
            loss_of(model, ids, advantages, bf16=arguments.bf16).backward()
        return reader.take()[1].mean(1).numpy()

    whole = read(10_000)
    lines = []
    for rank in RANKS:
        found = read(rank)
        correlations = {"pearson": round(pearson(found, whole), 3), "spearman": round(spearman(found, whole), 3)}
        lines.append({"model": arguments.model, "rank": rank, **correlations})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("cost", "memory", "fidelity"))
    parser.add_argument("--model", default="builtin", help="builtin, or a folder (default: builtin)")
    parser.add_argument("--sets", type=int, default=1, help="default: 1")
    parser.add_argument("--rank", type=int, default=8, help="default: 8")
    parser.add_argument("--rows", type=int, default=64, help="default: 64")
    parser.add_argument("--tokens", type=int, default=40, help="of a row, half of them the completion's (default: 40)")
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {"cost": cost, "memory": memory, "fidelity": fidelity}[arguments.command](arguments)
    for line in found if isinstance(found, list) else [found]:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
