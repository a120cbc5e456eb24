"""Validation sets: which of their groups give a direction, and when that is not to be trusted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa

from cropi.artifacts import OK
from cropi.config import ScoreConfig
from cropi.console import warn_once
from cropi.errors import SignalError
from cropi.gradients.groups import Group, iterate_groups
from cropi.seeds import unit_interval

NOISY = 0.2  # below this reliability of a validation direction a warning is given
FEW_GROUPS = 8  # below this many mixed validation groups a warning is given
ONE_SIDED = 0.9  # above this share of validation prompts that are always solved, or never, a warning is given


def validation_groups(trajectories: Mapping[str, pa.Table], config: ScoreConfig) -> dict[str, list[Group]]:
    """The mixed groups of every validation set: the others have a zero gradient. SignalError where a set has none."""
    names = sorted(name.removeprefix("validation/") for name in trajectories if name != "train")
    return {name: _mixed_groups(trajectories[f"validation/{name}"], name, config) for name in names}


def chosen_for_validation(prompt_ids: Iterable[str], config: ScoreConfig) -> list[str]:
    """The prompts of a validation set that are scored by, in ascending order."""
    # By hash rather than by id: ids that start with a source's name would pick one source.
    by_hash = sorted(prompt_ids, key=lambda i: unit_interval(0, "validation", i))
    return sorted(by_hash[: config.max_validation_prompts])


def _mixed_groups(table: pa.Table, name: str, config: ScoreConfig) -> list[Group]:
    groups = dict(iterate_groups(table))
    chosen = chosen_for_validation(groups, config)
    mixed = [group for i in chosen if (group := groups[i]) is not None and group.status == OK]
    if not mixed:
        raise SignalError(
            f"none of the {len(chosen)} prompts of this validation set has both better and worse completions, so it "
            "gives no direction to select by",
            where=f"prompts.validation.{name}",
            fix="use problems that the policy solves sometimes, or raise collect.validation_num_generations.",
        )
    if len(mixed) < FEW_GROUPS:
        warn_once(
            f"validation set {name}: only {len(mixed)} of {len(chosen)} prompts carry signal; influence will be noisy"
        )
    judged = one_sided([group for i in chosen if (group := groups[i]) is not None])
    if judged is not None:
        warn_once(f"validation set {name}: {judged}")
    return mixed


def one_sided(groups: Sequence[Group]) -> str | None:
    """What is wrong with a validation set of which over 90 % are solved by every completion, or by none; else None.

    Of grades, groups graded alike: at 1/2 and above, or below.
    """
    alike = [group.pass_rate >= 0.5 for group in groups if group.variance == 0]
    always, never, total = alike.count(True), alike.count(False), len(groups)
    rest = f"its direction comes from {total - always - never}"
    if always > 0 and always / total > ONE_SIDED:
        return (
            f"{always} of {total} prompts are solved by every completion: there is little left to gain, and {rest}; "
            "use harder problems"
        )
    if never > 0 and never / total > ONE_SIDED:
        return (
            f"{never} of {total} prompts are solved by no completion: {rest}; "
            "use easier problems, or raise collect.validation_num_generations"
        )
    return None


def warn_of_noise(reliability: Mapping[str, float]) -> None:
    """Say which validation directions could as well have been drawn by chance."""
    for name, value in reliability.items():
        if value < NOISY:
            warn_once(
                f"validation set {name}: its direction is mostly noise (reliability {max(value, 0.0):.2f}: the "
                "directions of two halves of its prompts hardly agree), so its ranking is little better than chance; "
                "use more prompts that the policy solves sometimes, or more completions for each"
            )
