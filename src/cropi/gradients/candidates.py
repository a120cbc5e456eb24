"""Training prompts that stand in for the validation sets."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from cropi.artifacts import OK
from cropi.curriculum.strategy import CANDIDATES
from cropi.errors import SignalError
from cropi.functional.alignment import halves
from cropi.gradients.groups import Group, iterate_groups
from cropi.seeds import unit_interval


def candidate_groups(table: pa.Table, count: int, seed: int) -> dict[str, list[Group]]:
    """Two halves of `count` mixed groups drawn at random from the training pool. SignalError for fewer than two."""
    mixed = {group.prompt_id: unit_interval(seed, "candidates", group.prompt_id) for group in _mixed(table)}
    if len(mixed) < 2:
        raise SignalError(
            f"{len(mixed)} training prompt has both better and worse completions, and two are needed to compare",
            where="prompts.train",
            fix="use problems that the policy solves sometimes, or raise collect.num_generations.",
        )
    half_of = {i: name for name, half in zip(CANDIDATES, halves(mixed, count), strict=True) for i in half}
    found: dict[str, list[Group]] = {name: [] for name in CANDIDATES}
    for group in _mixed(table):
        if group.prompt_id in half_of:
            found[half_of[group.prompt_id]].append(group)
    return found


def _mixed(table: pa.Table) -> Iterator[Group]:
    return (group for _, group in iterate_groups(table) if group is not None and group.status == OK)
