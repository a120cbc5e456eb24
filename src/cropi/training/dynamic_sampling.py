"""Dynamic sampling: replace groups whose rewards are all equal by mixed groups of further prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from trl import GRPOConfig

from cropi.errors import ConfigError
from cropi.training.reward_log import Judged, RecordedReward

EPSILON = 1e-6  # rewards that differ by less are equal


@dataclass(frozen=True)
class Sampled:
    """Completions of a generation batch, group by group: TRL's tensors and the judgements."""

    tensors: Mapping[str, Tensor]
    judged: Judged


@dataclass(frozen=True)
class Refilled:
    """A generation batch after its refills."""

    trained: Sampled
    dropped: Judged | None  # other groups that were sampled; None without a refill
    equal_before: float  # share of groups without variance in the first sample
    equal_after: float  # share in the batch that is trained on
    extra: int  # generation batches sampled beyond the first


@dataclass
class DynamicSampling:
    """Fill a generation batch with mixed groups: 0 < |{k: o_k is right}| < K (DAPO, arXiv 2503.14476, eq. 11).

    A group is mixed if its rewards differ, so that its advantages are not all zero. At most `refills` times, it samples
    the next prompts, as many as there are groups without variance. Groups that are still missing keep their first
    sample.
    """

    reward: RecordedReward
    generations: int  # K
    refills: int
    pad_id: int
    multiple: int | None = None  # TRL's pad_to_multiple_of
    drawn: int = 0  # prompts drawn from this selection so far

    def fill(self, sample: Callable[[int], Mapping[str, Tensor]], prompts: int) -> Refilled:
        """Build a generation batch of `prompts` groups; `sample` draws the next prompts and returns TRL's tensors."""
        batches = [self._judged(sample, prompts)]
        mixed = self._mixed(batches[0].judged)
        equal_before = mixed.count(False) / prompts
        chosen = list(range(prompts))  # the group at each place, counted over all that were sampled
        while not all(mixed) and len(batches) <= self.refills:
            sampled = sum(len(batch.judged.rewards) for batch in batches) // self.generations
            batches.append(self._judged(sample, mixed.count(False)))
            new = self._mixed(batches[-1].judged)
            found = [sampled + group for group, differs in enumerate(new) if differs]
            empty = [place for place, differs in enumerate(mixed) if not differs]
            for place, group in zip(empty, found, strict=False):  # more places than groups, or as many
                chosen[place], mixed[place] = group, True
        if len(batches) == 1:
            return Refilled(batches[0], None, equal_before, equal_before, 0)
        trained, dropped = self._divided(batches, chosen)
        return Refilled(trained, dropped, equal_before, mixed.count(False) / prompts, len(batches) - 1)

    def _mixed(self, judged: Judged) -> list[bool]:
        """Whether the rewards of each group differ; completions that could not be judged do not count."""
        groups = judged.groups(self.generations)
        return [bool(known) and max(known) - min(known) > EPSILON for _, known in groups]

    def _judged(self, sample: Callable[[int], Mapping[str, Tensor]], prompts: int) -> Sampled:
        tensors = sample(prompts)
        assert self.reward.latest is not None, "a generation batch is judged as it is sampled"
        return Sampled(tensors, self.reward.latest)

    def _divided(self, batches: Sequence[Sampled], chosen: Sequence[int]) -> tuple[Sampled, Judged]:
        everything = _joined(batches, self.pad_id)
        groups = range(len(everything.judged.rewards) // self.generations)
        left = [group for group in groups if group not in set(chosen)]
        trained, dropped = (everything.judged.rows(_rows(part, self.generations)) for part in (chosen, left))
        return Sampled(only_groups(everything.tensors, chosen, self.generations, self.multiple), trained), dropped


def _joined(batches: Sequence[Sampled], pad_id: int) -> Sampled:
    """Concatenate batches with TRL's padding: prompts on the left, everything else on the right."""
    tensors = {}
    for name, first in batches[0].tensors.items():
        parts = [batch.tensors[name] for batch in batches]
        if first.ndim == 2:
            width, value = max(part.shape[1] for part in parts), pad_id if name.endswith("_ids") else 0
            missing = [width - part.shape[1] for part in parts]
            sides = [(n, 0) if name.startswith("prompt_") else (0, n) for n in missing]
            parts = [functional.pad(part, side, value=value) for part, side in zip(parts, sides, strict=True)]
        if first.ndim:  # num_items_in_batch is counted anew
            tensors[name] = torch.cat(parts)
    columns = zip(*(vars(batch.judged).values() for batch in batches), strict=True)
    return Sampled(tensors, Judged(*([value for part in column for value in part] for column in columns)))


def _rows(groups: Sequence[int], generations: int) -> list[int]:
    return [group * generations + k for group in groups for k in range(generations)]


def only_groups(
    tensors: Mapping[str, Tensor], groups: Sequence[int], generations: int, multiple: int | None
) -> dict[str, Tensor]:
    """Return the rows of some groups of a generation batch."""
    rows = _rows(groups, generations)
    return _trimmed({name: tensor[rows] for name, tensor in tensors.items() if tensor.ndim}, multiple)


def _trimmed(tensors: Mapping[str, Tensor], multiple: int | None) -> dict[str, Tensor]:
    """Drop columns that are padding in every row, and count the tokens of the loss as `num_items_in_batch`."""
    completion_width = tensors["completion_mask"].shape[1]
    prompt, completion = (_width(tensors[f"{part}_mask"], multiple) for part in ("prompt", "completion"))
    trimmed = {}
    for name, tensor in tensors.items():
        if name.startswith("prompt_"):
            trimmed[name] = tensor[:, tensor.shape[1] - prompt :]
        elif tensor.ndim == 2 and tensor.shape[1] == completion_width:
            trimmed[name] = tensor[:, :completion]
        else:
            trimmed[name] = tensor
    return trimmed | {"num_items_in_batch": trimmed["completion_mask"].sum()}


def _width(mask_BT: Tensor, multiple: int | None) -> int:
    longest = max(1, int(mask_BT.sum(1).max()))
    return -(-longest // multiple) * multiple if multiple else longest


def check_dynamic_sampling(settings: GRPOConfig, refills: int) -> None:
    """Raise ConfigError for settings under which a refilled batch differs from a plain one with the same groups."""
    if not refills:
        return
    refused: dict[str, tuple[Any, str]] = {
        "scale_rewards": ("batch", "group or none"),
        "multi_objective_aggregation": ("normalize_then_sum", "sum_then_normalize"),
    }
    for name, (value, instead) in refused.items():
        if getattr(settings, name) == value:
            raise ConfigError(
                f"with {value!r} the advantages of a group depend on the groups that dynamic sampling drops",
                where=f"trainer.{name}",
                fix=f"use {instead}, or set train.dynamic_sampling to 0.",
            )
    if settings.world_size > 1:
        raise ConfigError(
            f"dynamic sampling supports one process, and this run has {settings.world_size}",
            where="train.dynamic_sampling",
            fix="start one process, or set it to 0.",
        )
