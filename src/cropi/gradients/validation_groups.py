"""Groups whose mean gradients are the directions: those of validation sets, or halves of a sample of the pool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import pyarrow as pa

from cropi.artifacts import OK
from cropi.console import warn_once
from cropi.curriculum.strategy import CANDIDATES
from cropi.errors import SignalError
from cropi.functional.influence_formulas import halves
from cropi.gradients.groups import Group, iterate_groups
from cropi.seeds import unit_interval

MOST_PROMPTS = 100  # of a validation set, as in the code of the paper
NOISY = 0.2  # below this reliability of a validation direction a warning is given
FEW_GROUPS = 8  # below this many mixed validation groups a warning is given
ONE_SIDED = 0.9  # above this share of validation prompts that are always solved, or never, a warning is given


def validation_groups(trajectories: Mapping[str, pa.Table]) -> dict[str, list[Group]]:
    """Return the mixed groups of every validation set; others have a zero gradient. Raises SignalError without any."""
    names = sorted(name.removeprefix("validation/") for name in trajectories if name != "train")
    return {name: _mixed_groups(trajectories[f"validation/{name}"], name) for name in names}


def chosen_for_validation(prompt_ids: Iterable[str]) -> list[str]:
    """Choose the prompts of a validation set that make its direction, in ascending order."""
    # By hash, not by id: ids may start with the name of a source, and one source would be picked.
    by_hash = sorted(prompt_ids, key=lambda i: unit_interval(0, "validation", i))
    return sorted(by_hash[:MOST_PROMPTS])


def _mixed_groups(table: pa.Table, name: str) -> list[Group]:
    groups = dict(iterate_groups(table))
    chosen = chosen_for_validation(groups)
    mixed = [group for i in chosen if (group := groups[i]) is not None and group.status == OK]
    if not mixed:
        raise SignalError(
            f"none of the {len(chosen)} prompts of this validation set has both better and worse completions, so it "
            "has no direction",
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
    """Describe a validation set of which over 90 % are solved by every completion, or by none; else None.

    With graded rewards, a group of equal grades counts as solved at 1/2 and above.
    """
    alike = [group.pass_rate >= 0.5 for group in groups if group.variance == 0]
    always, never, total = alike.count(True), alike.count(False), len(groups)
    rest = f"only {total - always - never} give its direction"
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
    """Warn of validation directions that are mostly noise."""
    for name, value in reliability.items():
        if value < NOISY:
            warn_once(
                f"validation set {name}: its direction is mostly noise (reliability {max(value, 0.0):.2f}, from two "
                "halves of its prompts), so its ranking is little better than chance. "
                "Use more prompts that the policy solves sometimes, or more completions for each"
            )


def candidate_groups(table: pa.Table, count: int, seed: int) -> dict[str, list[Group]]:
    """Draw `count` mixed groups of the training pool at random, in two halves. Raises SignalError below two."""
    mixed = {group.prompt_id: unit_interval(seed, "candidates", group.prompt_id) for group in _mixed(table)}
    if len(mixed) < 2:
        raise SignalError(
            f"{len(mixed)} training prompts have both better and worse completions, and at least two are needed",
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
