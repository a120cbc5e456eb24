"""Trajectories in shards: which prompts a shard holds, how they are sampled and judged, and how they are read back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from cropi.artifacts import GOLD_UNPARSEABLE, OK, TRAJECTORIES, TRUNCATED, read_table, write_table
from cropi.config import Config
from cropi.console import warn
from cropi.errors import ConfigError, DataError
from cropi.fsdp import in_lockstep
from cropi.parallel import process_group
from cropi.policy import Policy, PolicyCopy, completion_logprobs, evaluating, longest_alike
from cropi.prompts.encoding import encode_rows
from cropi.ray_workers import Perform, RayPool, Task
from cropi.rewards.pool import strict_judge
from cropi.rewards.verifier import Judge, answered
from cropi.rollouts.generation import Generator, Sampling, TransformersGenerator, VllmGenerator, longest_first
from cropi.rollouts.server import ServerGenerator
from cropi.seeds import derived_seed
from cropi.streams import Ledger


@dataclass(frozen=True)
class Shard:
    """Prompts of one set that are generated and stored together."""

    name: str
    set: str
    samples: int
    prompts: Sequence[Mapping[str, Any]]
    prompt_ids: Sequence[list[int]]

    @property
    def file(self) -> str:
        """Its file's name."""
        return f"{self.name}.parquet"

    def __len__(self) -> int:
        """Trajectories."""
        return len(self.prompts) * self.samples


Rows = list[dict[str, Any]]
MakeShards = Callable[[Sequence[Shard]], Iterator[tuple[Shard, Rows]]]
"""Makes, writes and charges shards; gives each with its rows when it is done, in any order."""


@dataclass(frozen=True)
class Sampler:
    """Samples shards. A shard's content depends on the run's seed and the shard's name alone."""

    config: Config
    policy: Policy
    generate: Generator
    judge: Judge

    def sample(self, shard: Shard) -> tuple[Rows, dict[str, int]]:
        """Sample and judge a shard. Returns its rows and their cost."""
        settings, rows = self.config.collect, self._judged(shard)
        prompts, completions = ([row[name] for row in rows] for name in ("prompt_ids", "completion_ids"))
        found = behaviour_logprobs(self.policy, prompts, completions, settings.temperature, settings.batch_tokens)
        for row, logprobs in zip(rows, found, strict=True):
            row["behaviour_logprobs"] = logprobs
        tokens = {
            name: sum(len(row[column]) for row in rows)
            for name, column in (("tokens", "completion_ids"), ("prompt_tokens", "prompt_ids"))
        }
        return rows, {"passes": 2, **tokens}  # generation, and log-probs

    def _judged(self, shard: Shard) -> Rows:
        """Rows of a shard without behaviour log-probs."""
        settings, tokenizer = self.config.collect, self.policy.tokenizer
        repeated = [ids for ids in shard.prompt_ids for _ in range(shard.samples)]
        prompts = [prompt for prompt in shard.prompts for _ in range(shard.samples)]
        seed = derived_seed(self.config.seed, "collect", shard.name)
        sampling = Sampling(settings.max_completion_length, settings.temperature)
        completions = self.generate(repeated, sampling, seed=seed)
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        judged = self.judge([answered(text, prompt) for text, prompt in zip(texts, prompts, strict=True)])
        eos, rows = set(self.policy.eos_ids), []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ended, reward = bool(completion) and completion[-1] in eos, judged[index].reward
            rows.append(
                {
                    "prompt_id": prompt["prompt_id"],
                    "set": shard.set,
                    "sample": index % shard.samples,
                    "prompt_ids": repeated[index],
                    "completion_ids": completion,
                    "behaviour_logprobs": None,
                    "completion": texts[index],
                    "reward": reward,
                    "verdict": judged[index].verdict,
                    "status": GOLD_UNPARSEABLE if reward is None else OK if ended else TRUNCATED,
                }
            )
        return rows

    def make(self, shards: Sequence[Shard], folder: Path, ledger: Ledger) -> Iterator[tuple[Shard, Rows]]:
        """Sample, judge, charge and write each shard in turn."""
        with in_lockstep(self.policy.model):
            for shard in shards:
                with ledger.charge_share("collect") as entry:
                    rows, cost = self.sample(shard)
                    entry |= cost
                write_table(folder / shard.file, rows, TRAJECTORIES)
                yield shard, rows


@dataclass(frozen=True)
class SampleJob:
    """Sampling of shards by a Ray worker."""

    config: Config
    policy: PolicyCopy

    def start(self) -> Perform:
        """Load the policy and start the verifier."""
        policy, config = self.policy.load(), self.config
        generate, judge = plain_generator(config, policy), strict_judge(config.verifier, config.verification)
        sampler = Sampler(config, policy, generate, judge)

        def perform(task: Task) -> Task:
            rows, cost = sampler.sample(Shard(**task.facts))
            return Task(task.index, pa.Table.from_pylist(rows, schema=TRAJECTORIES), cost)

        return perform


def make_shards_by_ray(
    pool: RayPool, config: Config, policy: Policy, folder: Path, ledger: Ledger, shards: Sequence[Shard]
) -> Iterator[tuple[Shard, Rows]]:
    """Have Ray workers make shards; write and charge each as it comes back."""
    if not shards:
        return  # no cluster is needed
    if config.collect.vllm is not None:
        raise ConfigError(
            "Ray workers start no vLLM of their own",
            where="collect.vllm",
            fix="start `vllm serve` and name it in collect.server.",
        )
    job = SampleJob(config, PolicyCopy.of(config.policy, policy.model, trained=False))
    tasks = (Task(index, pa.table({}), vars(shard)) for index, shard in enumerate(shards))
    with closing(pool.map(job, tasks)) as made:
        for task in made:
            shard, rows = shards[task.index], task.rows.to_pylist()
            write_table(folder / shard.file, rows, TRAJECTORIES)
            ledger.add("collect", **task.facts)
            yield shard, rows


@contextmanager
def pool_generator(config: Config, policy: Policy) -> Iterator[Generator]:
    """The generator for the whole pool: vLLM, a server, or transformers."""
    settings = config.collect
    if settings.vllm is not None and process_group().size > 1:
        raise ConfigError(
            "vLLM starts processes of its own, on GPUs that the other processes of this launch use",
            where="collect.vllm",
            fix="collect without a launcher first, or start `vllm serve` and name it in collect.server.",
        )
    if settings.vllm is not None:
        engine = VllmGenerator(policy, config.policy, settings.vllm)
        try:
            yield engine
        finally:
            engine.close()
    else:
        yield plain_generator(config, policy)


def plain_generator(config: Config, policy: Policy) -> Generator:
    """A generator that starts no engine: a server, or transformers."""
    if config.collect.server is not None:
        return ServerGenerator(policy, config.collect.server, config.collect.batch_size)
    return TransformersGenerator(policy, config.collect.batch_size)


def _longest(config: Config, policy: Policy) -> tuple[float, str]:
    """Longest sequence that the policy, what generates for it, and what scores it have room for; and what that is."""
    engine = (config.collect.vllm or {}).get("max_model_len")
    scored = config.score.estimator != "reference" and config.select.strategy.reads_scores
    context = min((limit for limit in (policy.context_length, engine) if limit is not None), default=math.inf)
    alike = longest_alike(policy.model) if scored else math.inf
    if alike < context:
        return alike, f"the {alike:.0f} tokens up to which the policy's rotary positions stay as they are, for scores,"
    return context, f"the policy's context of {context:.0f} tokens"


def plan(config: Config, policy: Policy, prompts: Sequence[Mapping[str, Any]]) -> tuple[list[Shard], list[str]]:
    """The shards of a collection, longest prompts first, and the ids of prompts that do not fit into the context."""
    limit, room = _longest(config, policy)
    shards: list[Shard] = []
    too_long: list[str] = []
    sets = dict.fromkeys(row["set"] for row in prompts if not row["set"].startswith("test/"))
    for name in sets:
        rows = [row for row in prompts if row["set"] == name]
        pairs = list(zip(rows, encode_rows(policy.tokenizer, config.prompts, rows), strict=True))
        fitting = [p for p in pairs if len(p[1]) + config.collect.max_completion_length <= limit]
        fits = {row["prompt_id"] for row, _ in fitting}
        too_long += [row["prompt_id"] for row in rows if row["prompt_id"] not in fits]
        if not fitting:
            raise DataError(
                f"no prompt of {name} fits into {room} beside its completion",
                where="collect.max_completion_length",
                fix="lower it, or use a policy with a longer context.",
            )
        fitting.sort(key=lambda pair: (-len(pair[1]), pair[0]["prompt_id"]))
        samples = config.collect.num_generations if name == "train" else config.collect.validation_num_generations
        size = config.collect.shard_prompts
        for start in range(0, len(fitting), size):
            chosen = fitting[start : start + size]
            label = f"part-{name.replace('/', '-')}-{start // size:05}"
            shards.append(Shard(label, name, samples, [row for row, _ in chosen], [ids for _, ids in chosen]))
    if too_long:
        warn(f"{len(too_long)} prompts do not fit into {room} and are left out")
    return shards, too_long


def holds(shard: Shard, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rows are of a shard's prompts, all of them and no others."""
    expected = [(row["prompt_id"], sample) for row in shard.prompts for sample in range(shard.samples)]
    return [(row["prompt_id"], row["sample"]) for row in rows] == expected


@torch.no_grad()
def behaviour_logprobs(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    temperature: float,
    batch_tokens: int,
) -> list[list[float]]:
    """log beta of every completion token, float32, in batches of at most `batch_tokens` padded tokens; no dropout."""
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    result: list[list[float]] = [[] for _ in prompts]
    with evaluating(policy.model):
        for rows in longest_first(lengths, batch_tokens):
            logprobs_KT, _ = completion_logprobs(
                policy.model, [prompts[r] for r in rows], [completions[r] for r in rows], temperature=temperature
            )
            for row, values in zip(rows, logprobs_KT.float().cpu().tolist(), strict=True):
                result[row] = values[: len(completions[row])]
    return result


def read_trajectories(folder: Path, *, mask_truncated: bool = False) -> dict[str, pa.Table]:
    """All trajectories by set; no set where there are none.

    `mask_truncated`: with truncated completions left empty. Each then counts in the advantages of its group and weighs
    nothing, as with TRL's `mask_truncated_completions`.
    """
    paths = sorted(folder.glob("part-*.parquet"))
    table = pa.concat_tables([TRAJECTORIES.empty_table(), *(read_table(path, TRAJECTORIES) for path in paths)])
    for place, name in enumerate(TRAJECTORIES.names):
        if mask_truncated and name in {"completion_ids", "behaviour_logprobs"}:
            column = table.column(name)
            emptied = pc.and_(pc.equal(table.column("status"), TRUNCATED), pc.is_valid(column))
            masked = pc.if_else(emptied, pa.scalar([], column.type), column)
            table = table.set_column(place, TRAJECTORIES.field(name), masked)
    sets = table.column("set").to_pylist()
    return {
        name: table.take(pa.array([row for row, value in enumerate(sets) if value == name]))
        for name in dict.fromkeys(sets)
    }
