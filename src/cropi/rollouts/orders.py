"""Shards that workers elsewhere make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cropi.artifacts import PROMPTS, TRAJECTORIES, write_table
from cropi.config import Config
from cropi.elsewhere import CarriedPolicy, Elsewhere
from cropi.errors import ConfigError
from cropi.ledger import Ledger
from cropi.rewards.pool import strict_judge
from cropi.rollouts.shards import MakeShards, Rows, Sampler, Shard, holds, plain_generator
from cropi.workers import Make, Unit

DESCRIPTION = PROMPTS.append(pa.field("prompt_ids", pa.list_(pa.int32())))


@dataclass(frozen=True)
class CollectOrder:
    """To sample and judge shards as the policy that it carries."""

    config: dict[str, Any]
    policy: CarriedPolicy
    purpose: tuple[str | int, ...] = ("collect",)

    def begin(self) -> Make:
        policy = self.policy.load()  # first: relative names in the config start where it leads
        config = Config.model_validate(self.config)
        generate, judge = plain_generator(config, policy), strict_judge(config.verifier, config.verification)
        sampler = Sampler(config, policy, generate, judge, self.purpose, config.collect.logprobs)

        def make(unit: Unit) -> Unit:
            rows, cost = sampler.sample(shard_of(unit))
            return Unit(unit.index, pa.Table.from_pylist(rows, schema=TRAJECTORIES), cost)

        return make


def described(index: int, shard: Shard) -> Unit:
    """What a worker needs to know of a shard."""
    rows = [{**row, "prompt_ids": ids} for row, ids in zip(shard.prompts, shard.prompt_ids, strict=True)]
    facts = {"name": shard.name, "set": shard.set, "samples": shard.samples}
    return Unit(index, pa.Table.from_pylist(rows, schema=DESCRIPTION), facts)


def shard_of(unit: Unit) -> Shard:
    """The shard that is described."""
    rows = unit.rows.to_pylist()
    ids = [row.pop("prompt_ids") for row in rows]
    return Shard(unit.facts["name"], unit.facts["set"], unit.facts["samples"], rows, ids)


def shards_elsewhere(elsewhere: Elsewhere, config: Config, folder: Path, ledger: Ledger) -> MakeShards:
    """Has shards made, writes each as it comes back, and charges the seconds that its worker has measured."""
    if config.collect.vllm is not None:
        raise ConfigError(
            "workers elsewhere generate with transformers or ask a server, and start no vLLM of their own",
            where="collect.vllm",
            fix="start `vllm serve` and name it in collect.server.",
        )
    order = CollectOrder(config.resolved(), elsewhere.policy)

    def make(shards: Sequence[Shard]) -> Iterator[tuple[Shard, Rows]]:
        if not shards:
            return  # no cluster is needed
        units = (described(index, shard) for index, shard in enumerate(shards))
        with closing(elsewhere.workers.each(order, units)) as made:
            for unit in made:
                shard, rows = shards[unit.index], unit.rows.to_pylist()
                if not holds(shard, rows):
                    raise ValueError(f"shard {shard.name} came back with other prompts")
                write_table(folder / shard.file, rows, TRAJECTORIES)
                ledger.add("collect", **unit.facts)
                yield shard, rows

    return make
