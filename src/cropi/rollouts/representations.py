"""Representations of prompts: the mean of the policy's hidden states over the prompt, the last layer's if unsaid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float

from cropi.artifacts import REPRESENTATIONS, read_table, write_batches
from cropi.config import Config
from cropi.console import progress
from cropi.errors import ArtifactError
from cropi.parallel import process_group
from cropi.policy import Policy, evaluating
from cropi.prompts.encoding import Encode, encode_rows
from cropi.rollouts.generation import longest_first

KIND = "representations"
ROWS = 4096  # rows of the file per write
Representations = Mapping[tuple[str, str], Float[np.ndarray, " E"]]  # by (set, prompt id)


def represent(
    config: Config, policy: Policy, prompts: Sequence[Mapping[str, Any]], folder: Path, encode: Encode | None = None
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write `representations.parquet` of all training and validation prompts; returns (rows by set, details).

    One forward pass over each prompt, in batches that the ranks share. Prompts longer than the context lose their
    beginning. `encode` unset: prompts are encoded by the config.
    """
    rows = [row for row in prompts if not row["set"].startswith("test/")]
    encode = encode or partial(encode_rows, policy.tokenizer, config.prompts)
    encoded = [ids[-(policy.context_length or len(ids)) :] for ids in encode(rows)]
    ranks = process_group()
    batches = ranks.share(longest_first([*map(len, encoded)], config.collect.batch_tokens))
    with progress(ranks.titled("represent"), sum(map(len, batches)), "prompts") as bar:
        own = _mean_hidden_states(policy, encoded, batches, bar.advance, config.select.strategy.represented_depth)
    of_row = {row: values for part in ranks.gather(own) for row, values in part.items()}
    if ranks.is_main:
        write_batches(folder / "representations.parquet", _record_batches(rows, of_row), REPRESENTATIONS)
    return dict(Counter(row["set"] for row in rows)), {"prompt_tokens": sum(map(len, encoded))}


def read_representations(folder: Path) -> Representations:
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


@torch.no_grad()
def _mean_hidden_states(
    policy: Policy, prompts: Sequence[Sequence[int]], batches: Sequence[Sequence[int]], advance: Any, depth: float = 1.0
) -> dict[int, Float[np.ndarray, " E"]]:
    """Mean hidden states by row, of the layer at a depth from 0, the embeddings, to 1, the last.

    Padding follows the prompt, so under a causal mask it changes nothing.
    """
    found: dict[int, Any] = {}
    with evaluating(policy.model):
        for rows in batches:
            width = max(len(prompts[row]) for row in rows)
            ids = torch.tensor([[*prompts[r], *[0] * (width - len(prompts[r]))] for r in rows], device=policy.device)
            layers = policy.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
            hidden = layers[min(round(depth * len(layers)), len(layers) - 1)]
            for row, states_TE in zip(rows, hidden, strict=True):
                found[row] = states_TE[: len(prompts[row])].float().mean(dim=0).cpu().numpy()
            advance(len(rows))
    return found
