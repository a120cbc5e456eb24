"""What strategies read of the base policy: K trajectories per prompt (`collect`), and representations of the prompts.

Trajectories come in shards that survive an interruption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from cropi.artifacts import (
    GOLD_UNPARSEABLE,
    NO_SIGNAL,
    PROMPT_TOO_LONG,
    REPRESENTATIONS,
    TRAJECTORIES,
    Manifest,
    build,
    read_table,
    wait_for_files,
    write_batches,
)
from cropi.config import SAMPLED_BY, Config
from cropi.console import counts_text, progress, say, warn
from cropi.errors import ArtifactError
from cropi.gradients.score_shards import make_scorer
from cropi.gradients.validation_directions import validation_groups
from cropi.parallel import process_group
from cropi.policy import Policy, evaluating, mean_hidden_states
from cropi.prompts import data_identity, make_prompts
from cropi.prompts.encoding import Encode, chat_warnings
from cropi.ray_workers import ray_pool
from cropi.rewards.verifier import ERROR, TIMEOUT, Judge
from cropi.rollouts.generation import longest_first
from cropi.rollouts.shards import MakeShards, Sampler, Shard, holds, make_shards_by_ray, plan, pool_generator
from cropi.stages.run import Run, require_signal
from cropi.streams import Ledger

MANY_FAILURES = 0.02  # share of the completions on which a verifier may fail without a warning


# -- the stage -----------------------------------------------------------------------------------------------------


def make_prompt_table(run: Run) -> Manifest:
    """Write the prompt table."""
    inputs = data_identity(run.config) | {"settings": run.folder.settings("prompts")}
    make = partial(make_prompts, run.config)
    return build(run.folder.prompts, "prompts", make, inputs=inputs, made_by="cropi collect")


def collect(run: Run) -> Manifest:
    """Collect trajectories of the base policy. SignalError where they give the run's strategy nothing to learn from."""
    prompts = make_prompt_table(run)
    folder, strategy = run.folder.trajectories, run.config.select.strategy
    if strategy.reads_scores and not run.is_finished(folder):
        make_scorer(run.config, run.base.model, run.surrogate)  # refuses a model before anything is generated
    inputs: dict[str, Any] = {"prompts": prompts.identity, "policy": run.setup.identity}
    inputs |= {"settings": run.folder.settings(*SAMPLED_BY)}
    manifest = build(
        folder,
        "trajectories",
        partial(_collect, run),
        inputs=inputs,
        made_by="cropi collect",
        keep_parts=True,
        shared=True,
    )
    _tell(run, manifest)
    if strategy.aims_at_validation:
        validation_groups(run.trajectories.tables)
    return manifest


def _collect(run: Run, folder: Path) -> tuple[Mapping[str, int], Mapping[str, Any]]:
    rows, chat = run.folder.prompt_rows, run.config.prompts.chat
    for text in chat_warnings(run.base.tokenizer, chat, (row["messages"] for row in rows)):
        warn(text)
    return sample_prompts(run.config, run.base, run.judge, run.ledger, rows, folder)


def _tell(run: Run, manifest: Manifest) -> None:
    """Print what was collected, and warn of a verifier that fails often."""
    if not run.config.select.strategy.collects:
        say(f"nothing is collected: {run.config.select.label} reads no trajectories")
        return
    verdicts = manifest.details["verdicts"]
    say(f"trajectories: {counts_text(manifest.counts)}")
    say(f"verdicts: {counts_text(verdicts)}")
    failed, total = verdicts.get(ERROR, 0) + verdicts.get(TIMEOUT, 0), sum(verdicts.values())
    if failed > MANY_FAILURES * total:
        warn(
            f"the verifier failed on {failed} of {total} completions, and they earned nothing. If they should have, "
            f"mend it, delete {run.folder.trajectories} and run again (`cropi audit-rewards` tells more)"
        )
    mixed, sampled = require_signal(run.trajectories.statuses), len(run.trajectories.groups)
    say(f"groups: {mixed} of {sampled} mixed" + (", the others carry no signal now" if mixed < sampled else ""))


# -- sampling ------------------------------------------------------------------------------------------------------


def sample_prompts(
    config: Config, policy: Policy, judge: Judge, ledger: Ledger, prompts: Sequence[Mapping[str, Any]], folder: Path
) -> tuple[dict[str, int], dict[str, Any]]:
    """Sample the pool and the validation sets from the base policy. Returns (rows by status, details).

    Shards that are in the folder already are kept. The ranks divide the missing ones, or Ray workers make them; their
    content does not depend on that. The model itself computes the behaviour log-probs at the sampling temperature. A
    prompt that does not fit into the policy's context counts as one row `prompt_too_long`.
    """
    shards, too_long = plan(config, policy, prompts)
    workers = ray_pool()
    if not config.select.strategy.collects:
        counts, details = _summed([])
    elif workers is not None:
        make = partial(make_shards_by_ray, workers, config, policy, folder, ledger)
        counts, details = _sample_all(folder, shards, make)
    else:
        with pool_generator(config, policy) as generate:
            sampler = Sampler(config, policy, generate, judge)
            make = partial(sampler.make, folder=folder, ledger=ledger)
            counts, details = _sample_all(folder, shards, make)
    counts[PROMPT_TOO_LONG] += len(too_long)
    return _by_name(+counts), details | {"too_long": too_long}


def _sample_all(folder: Path, shards: Sequence[Shard], make: MakeShards) -> tuple[Counter[str], dict[str, Any]]:
    """Make the missing shards; returns (trajectories by status, details) on rank 0."""
    ranks = process_group()
    missing = ranks.from_main(lambda: [n for n, shard in enumerate(shards) if not (folder / shard.file).is_file()])
    still = set(missing)
    kept = [shard for place, shard in enumerate(shards) if place not in still]
    own = [shards[place] for place in ranks.share(missing)]
    found: dict[str, _Found] = {}
    if ranks.is_main:
        found = {shard.name: _found(_stored(folder, shard)) for shard in kept}
    done, total = (sum(map(len, part)) for part in (kept, (*kept, *own)))
    with progress(ranks.titled("collect"), total, "trajectories", done=done) as bar:
        for shard, rows in make(own):
            found[shard.name] = _found(rows)
            bar.advance(len(shard))
    ranks.barrier()
    if not ranks.is_main:
        return Counter(), {}
    wait_for_files(folder / shard.file for shard in shards)
    return _summed([found.get(shard.name) or _found(_stored(folder, shard)) for shard in shards])


@dataclass(frozen=True)
class _Found:
    """Facts of one shard, to be summed over a collection."""

    set: str
    counts: Mapping[str, Counter[str]]  # trajectories by `status` and `verdict`, groups by `signal`
    tokens: int


def _found(rows: Sequence[Mapping[str, Any]]) -> _Found:
    groups = [list(own) for _, own in groupby(rows, key=lambda row: row["prompt_id"])]
    counts = {name: Counter(row[name] for row in rows) for name in ("status", "verdict")}
    tokens = sum(len(row["completion_ids"]) for row in rows)
    return _Found(rows[0]["set"], counts | {"signal": Counter(map(_signal, groups))}, tokens)


def _signal(group: Sequence[Mapping[str, Any]]) -> str:
    """`mixed` for a group with better and worse completions, else why it has no gradient."""
    if any(row["status"] == GOLD_UNPARSEABLE for row in group):
        return GOLD_UNPARSEABLE
    differ = len({row["reward"] for row in group}) > 1
    return "mixed" if differ and any(row["completion_ids"] for row in group) else NO_SIGNAL


def _summed(shards: Sequence[_Found]) -> tuple[Counter[str], dict[str, Any]]:
    """Trajectories by status, and details, from which reports take the counts of every set."""
    sets: dict[str, dict[str, Counter[str]]] = {}
    for shard in shards:
        own = sets.setdefault(shard.set, {name: Counter() for name in shard.counts})
        for name, counts in shard.counts.items():
            own[name] += counts
    statuses, verdicts = (sum((own[name] for own in sets.values()), Counter[str]()) for name in ("status", "verdict"))
    details = {
        "generated_tokens": sum(shard.tokens for shard in shards),
        "shards": len(shards),
        "verdicts": _by_name(verdicts),
        "sets": {name: {kind: _by_name(counts) for kind, counts in own.items()} for name, own in sorted(sets.items())},
    }
    return statuses, details


def _by_name(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _stored(folder: Path, shard: Shard) -> list[dict[str, Any]]:
    """A shard that an earlier attempt or another process has made, held to the prompts it must contain."""
    path = folder / shard.file
    rows = read_table(path, TRAJECTORIES).to_pylist()
    if not holds(shard, rows):
        raise ArtifactError("holds other prompts than this run's", where=str(path), fix=f"delete {path} and run again.")
    return rows


# -- representations -----------------------------------------------------------------------------------------------

REPRESENTED = "representations"
ROWS = 4096  # rows of the file per write


def make_representations(run: Run) -> None:
    """Store the base policy's representations of the prompts, charged to scoring."""

    def make(folder: Path) -> tuple[Mapping[str, int], Mapping[str, Any]]:
        with run.ledger.charge("score") as entry:
            result = represent(run.config, run.base, run.folder.prompt_rows, folder, run.encode)
            entry |= {"forward_tokens": result[1]["prompt_tokens"]}
        return result

    inputs: dict[str, Any] = {"prompts": make_prompt_table(run).identity, "policy": run.setup.identity}
    inputs |= {"settings": run.folder.settings("policy", "prompts")}
    depth = run.config.select.strategy.represented_depth
    inputs |= {} if depth == 1 else {"depth": depth}
    folder = run.folder.representations
    build(folder, REPRESENTED, make, inputs=inputs, made_by="cropi train", shared=True)


def represent(
    config: Config, policy: Policy, prompts: Sequence[Mapping[str, Any]], folder: Path, encode: Encode
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write `representations.parquet` of all training and validation prompts; returns (rows by set, details).

    One forward pass over each prompt, in batches that the ranks share. Prompts longer than the context lose their
    beginning.
    """
    rows = [row for row in prompts if not row["set"].startswith("test/")]
    encoded = [ids[-(policy.context_length or len(ids)) :] for ids in encode(rows)]
    ranks, depth = process_group(), config.select.strategy.represented_depth
    batches = ranks.share(longest_first([*map(len, encoded)], config.collect.batch_tokens))
    own: dict[int, Float[np.ndarray, " E"]] = {}
    with progress(ranks.titled("represent"), sum(map(len, batches)), "prompts") as bar, evaluating(policy.model):
        for batch in batches:
            parts = mean_hidden_states(policy.model, [encoded[row] for row in batch], depth)
            own |= zip(batch, parts, strict=True)
            bar.advance(len(batch))
    of_row = {row: values for part in ranks.gather(own) for row, values in part.items()}
    if ranks.is_main:
        write_batches(folder / "representations.parquet", _record_batches(rows, of_row), REPRESENTATIONS)
    return dict(Counter(row["set"] for row in rows)), {"prompt_tokens": sum(map(len, encoded))}


def read_representations(folder: Path) -> Mapping[tuple[str, str], Float[np.ndarray, " E"]]:
    """Representations by (set, prompt id), float32."""
    path = folder / "representations.parquet"
    table = read_table(path, REPRESENTATIONS)
    column = table.column("representation")
    widths = pc.unique(pc.list_value_length(column))
    if len(widths) > 1:
        raise ArtifactError("representations differ in length", where=str(path), fix=f"delete {folder}.")
    width = widths[0].as_py() if len(widths) else 0
    vectors = [vector for chunk in column.chunks for vector in chunk.flatten().to_numpy().reshape(-1, width)]
    keys = zip(table.column("set").to_pylist(), table.column("prompt_id").to_pylist(), strict=True)
    return dict(zip(keys, vectors, strict=True))


def _record_batches(
    rows: Sequence[Mapping[str, Any]], values: Mapping[int, Float[np.ndarray, " E"]]
) -> Iterator[pa.RecordBatch]:
    """Yield the table in blocks, without converting its values to Python numbers."""
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        matrix_BE = np.stack([values[start + row] for row in range(len(part))])
        ends = np.arange(len(part) + 1, dtype=np.int32) * matrix_BE.shape[1]
        columns = [
            pa.array([row["set"] for row in part]),
            pa.array([row["prompt_id"] for row in part]),
            pa.ListArray.from_arrays(ends, matrix_BE.reshape(-1)),
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=REPRESENTATIONS)
