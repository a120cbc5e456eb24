"""Where prompts lie to each other as the policy sees them: the mean of its last hidden states over the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from cropi.artifacts import REPRESENTATIONS, read_table, write_table
from cropi.config import Config
from cropi.console import progress
from cropi.policy import Policy, encode_prompts, trainer_prompt, uses_chat
from cropi.world import ALONE, World

KIND = "representations"
Representations = Mapping[tuple[str, str], Float[np.ndarray, " E"]]  # by (set, prompt id)


def represent(
    config: Config, policy: Policy, prompts: Sequence[Mapping[str, Any]], folder: Path, world: World = ALONE
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write `representations.parquet` of all training and validation prompts to `folder`; (rows by set, details).

    One forward pass over each prompt, in batches that are divided among the processes of `world`. A prompt that does
    not fit into the context is cut at its beginning.
    """
    rows = [row for row in prompts if not row["set"].startswith("test/")]
    chat = uses_chat(policy.tokenizer, config.prompts.chat, config.prompts.system_prompt)
    system = config.prompts.system_prompt
    texts = [trainer_prompt(row["messages"], chat=chat, system_prompt=system) for row in rows]
    encoded = [ids[-(policy.context_length or len(ids)) :] for ids in encode_prompts(policy.tokenizer, texts)]
    batches = world.share(_batches(encoded, config.collect.batch_tokens))
    with progress(world.titled("represent"), sum(map(len, batches)), "prompts") as bar:
        own = _mean_hidden_states(policy, encoded, batches, bar.advance)
    of_row = {row: values for part in world.gather(own) for row, values in part.items()}
    found = [of_row[row] for row in range(len(rows))]
    table = [
        {"set": row["set"], "prompt_id": row["prompt_id"], "representation": values.tolist()}
        for row, values in zip(rows, found, strict=True)
    ]
    if world.is_main:
        write_table(folder / "representations.parquet", table, REPRESENTATIONS)
    counts = {name: sum(row["set"] == name for row in rows) for name in dict.fromkeys(row["set"] for row in rows)}
    return counts, {"prompt_tokens": sum(map(len, encoded))}


def read_representations(folder: Path) -> Representations:
    """Representations by (set, prompt id)."""
    table = read_table(folder / "representations.parquet", REPRESENTATIONS)
    matrix_NE = np.array(table.column("representation").to_pylist(), dtype=np.float64)
    keys = zip(table.column("set").to_pylist(), table.column("prompt_id").to_pylist(), strict=True)
    return dict(zip(keys, matrix_NE, strict=True))


def _batches(prompts: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    """Rows of at most so many padded tokens, the longest prompts first."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    batches = []
    while order:
        size = max(1, batch_tokens // len(prompts[order[0]]))
        batches.append(order[:size])
        order = order[size:]
    return batches


@torch.no_grad()
def _mean_hidden_states(
    policy: Policy, prompts: Sequence[Sequence[int]], batches: Sequence[Sequence[int]], advance: Any
) -> dict[int, Float[np.ndarray, " E"]]:
    """By row. Padding follows a prompt, so under a causal mask it changes nothing."""
    found: dict[int, Any] = {}
    device, training = policy.device, policy.model.training
    policy.model.eval()
    try:
        for rows in batches:
            width = max(len(prompts[row]) for row in rows)
            ids = torch.tensor([[*prompts[r], *[0] * (width - len(prompts[r]))] for r in rows], device=device)
            hidden = policy.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
            for row, states_TE in zip(rows, hidden, strict=True):
                found[row] = states_TE[: len(prompts[row])].float().mean(dim=0).cpu().numpy()
            advance(len(rows))
    finally:
        policy.model.train(training)
    return found
