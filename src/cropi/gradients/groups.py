"""A group: the K trajectories of one prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cropi.artifacts import GOLD_UNPARSEABLE, NO_SIGNAL, OK
from cropi.functional.influence_formulas import reward_variance


@dataclass(frozen=True)
class Group:
    """Token ids, rewards and behaviour log-probs of a prompt's K completions.

    A completion includes its end-of-sequence token if it has one; every completion token counts. An empty completion
    counts in the advantages but has no weight, like one masked by the trainer's loss. Behaviour log-probs of None mean
    on-policy trajectories: every importance ratio is 1.
    """

    prompt_id: str
    prompt_ids: list[int]
    completions: list[list[int]]
    rewards: list[float]
    behaviour_logprobs: list[list[float]] | None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(f"prompt {self.prompt_id}: the prompt has no token")
        if len(self.completions) != len(self.rewards):
            raise ValueError(
                f"prompt {self.prompt_id}: {len(self.completions)} completions, {len(self.rewards)} rewards"
            )
        logprobs = self.behaviour_logprobs
        if logprobs is not None and [len(row) for row in logprobs] != [len(row) for row in self.completions]:
            raise ValueError(f"prompt {self.prompt_id}: behaviour log-probs and completions differ in length")

    @property
    def status(self) -> str:
        """`ok` if the rewards differ and a completion has a token; `no_signal` if the gradient is zero."""
        mixed = any(reward != self.rewards[0] for reward in self.rewards) and any(self.completions)
        return OK if mixed else NO_SIGNAL

    @property
    def pass_rate(self) -> float:
        """Mean reward."""
        return sum(self.rewards) / len(self.rewards) if self.rewards else float("nan")

    @property
    def variance(self) -> float:
        """Variance of the rewards: p (1 - p) if they are 0 and 1."""
        return float(reward_variance(np.array(self.rewards, dtype=np.float64)))

    @property
    def completion_tokens(self) -> int:
        return sum(len(completion) for completion in self.completions)


class GroupFacts(NamedTuple):
    """Reward statistics of a prompt's stored trajectories; NaN without rewards."""

    status: str
    pass_rate: float  # mean reward
    variance: float  # of the rewards
    size: int = 0  # trajectories with a reward


def group_facts(table: pa.Table) -> dict[str, GroupFacts]:
    """Return status, pass rate and variance of every group of one set's trajectories, by prompt id."""
    unreadable = GroupFacts(GOLD_UNPARSEABLE, math.nan, math.nan)
    return {
        prompt_id: unreadable
        if group is None
        else GroupFacts(group.status, group.pass_rate, group.variance, len(group.rewards))
        for prompt_id, group in iterate_groups(table)
    }


_COLUMNS = ["prompt_id", "sample", "prompt_ids", "completion_ids", "behaviour_logprobs", "reward", "status"]
_ROWS_AT_ONCE = 4096


def iterate_groups(table: pa.Table) -> Iterator[tuple[str, Group | None]]:
    """Yield (prompt id, group) of one set's trajectories by ascending prompt id, a few thousand rows at a time.

    The group is None if the gold answer cannot be read (status `gold_unparseable`), because then there are no rewards.
    """
    order = pc.sort_indices(
        table.select(["prompt_id", "sample"]), sort_keys=[("prompt_id", "ascending"), ("sample", "ascending")]
    )
    for prompt_id, rows in groupby(_rows(table.select(_COLUMNS), order), lambda row: row["prompt_id"]):
        yield prompt_id, _group(prompt_id, list(rows))


def _rows(table: pa.Table, order: pa.Array) -> Iterator[dict[str, Any]]:
    for start in range(0, len(order), _ROWS_AT_ONCE):
        yield from table.take(order.slice(start, _ROWS_AT_ONCE)).to_pylist()


def _group(prompt_id: str, rows: list[Mapping[str, Any]]) -> Group | None:
    if any(row["status"] == GOLD_UNPARSEABLE for row in rows):
        return None
    logprobs = [row["behaviour_logprobs"] for row in rows]
    return Group(
        prompt_id,
        rows[0]["prompt_ids"],
        [row["completion_ids"] for row in rows],
        [row["reward"] for row in rows],
        None if logprobs[0] is None else logprobs,  # collected for the policy that sampled them: ratio 1
    )
