"""Rewards and influence of the groups of a generation batch, put together from its micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from torch import Tensor
from trl import GRPOConfig

from cropi.functional.surrogate import EPSILON
from cropi.parallel import process_group
from cropi.training.reward_log import Judged


@dataclass(frozen=True)
class GroupOutcome:
    """A finished group. `influence_VCH`: of two halves of its completions, with better and worse ones in
    both, against the two halves of each validation set's direction, if it was read."""

    number: int  # of the group in its generation batch
    prompt_id: str
    rewards: Sequence[float]  # of the completions that could be judged
    influence_VCH: Float[np.ndarray, "V 2 2"] | None


@dataclass
class GroupEvidence:
    """Collects what the micro-batches of a generation batch give, and divides it among the groups at the end."""

    prompt_tokens: Mapping[str, Tokens]  # by prompt id; only for what is read
    generations: int  # K
    pad_id: int
    batch_scaled: bool = False  # advantages were divided by the deviation of the whole batch's rewards
    dropped: int = 0  # rows that could not be matched, over all batches
    _rows: list[LossRow] = field(default_factory=list)
    _values: list[Float[np.ndarray, "V 2"]] = field(default_factory=list)

    def add(self, rows: Sequence[LossRow], values_BVH: Tensor) -> None:
        """Keep the influence of the rows of a micro-batch, free of the loss's normaliser."""
        self._rows += rows
        self._values += list(values_BVH.double().numpy())

    @property
    def is_begun(self) -> bool:
        """Whether some rows of a generation batch have been read."""
        return bool(self._rows)

    def forget(self) -> None:
        """Leave out what was read of the batch so far."""
        self._rows, self._values = [], []

    def finish(self, judged: Judged) -> list[GroupOutcome]:
        """Return the groups of the batch in order, and forget it. Collective: a group may lie on several processes.

        A group has influence only if all its completions were judged and found again. With rewards scaled by the batch,
        influence is multiplied by their deviation, so that it does not depend on the other groups.
        """
        count, ranks = len(judged.prompt_ids), process_group()
        first = ranks.rank * count
        matched = match_rows(self._sampled(judged, first), self._rows, self.pad_id) if self._rows else []
        read = [
            (None if place is None else first + place, values)
            for place, values in zip(matched, self._values, strict=True)
        ]
        self._rows, self._values = [], []
        judgements = list(zip(range(first, first + count), judged.prompt_ids, judged.rewards, strict=True))
        parts = ranks.gather((judgements, read))
        return self._outcomes([row for part in parts for row in part[0]], [row for part in parts for row in part[1]])

    def _sampled(self, judged: Judged, first: int) -> list[SampledRow]:
        return [
            SampledRow(self.prompt_tokens[prompt_id], tuple(ids), (first + row) // self.generations)
            for row, (prompt_id, ids) in enumerate(zip(judged.prompt_ids, judged.completion_ids, strict=True))
        ]

    def _outcomes(
        self,
        judgements: Sequence[tuple[int, str, float | None]],
        read: Sequence[tuple[int | None, Float[np.ndarray, "V 2"]]],
    ) -> list[GroupOutcome]:
        self.dropped += sum(row is None for row, _ in read)
        values = {row: value_VH for row, value_VH in read if row is not None}
        known = [reward for *_, reward in judgements if reward is not None]
        scale = float(np.std(known, ddof=1)) + EPSILON if self.batch_scaled and len(known) > 1 else 1.0
        groups: dict[int, list[tuple[int, str, float | None]]] = {}
        for row, prompt_id, reward in judgements:
            groups.setdefault(row // self.generations, []).append((row, prompt_id, reward))
        outcomes = []
        for number, rows in sorted(groups.items()):
            judged = sorted((reward, row) for row, _, reward in rows if reward is not None)
            halves, rewards = None, [reward for *_, reward in rows if reward is not None]
            if len(judged) == len(rows) and all(row in values for _, row in judged):
                parts = [sum(values[row] for _, row in judged[half::2]) for half in (0, 1)]
                halves = scale * np.stack(parts, axis=1)
            outcomes.append(GroupOutcome(number, rows[0][1], rewards, halves))
        return outcomes


# -- rows of a loss ------------------------------------------------------------------------------------------------

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class SampledRow:
    """A completion as it was sampled, with the number of its group in the generation batch."""

    prompt: Tokens
    completion: Tokens
    group: int


@dataclass(frozen=True)
class LossRow:
    """A row as the loss sees it. `masked`: no token of the completion counts, so its gradient is zero."""

    prompt: Tokens
    completion: Tokens
    masked: bool


def loss_rows(inputs: Mapping[str, Tensor], pad_id: int) -> list[LossRow]:
    """Rows of a micro-batch in TRL's layout: prompts padded on the left, completions on the right.

    The mask tells which tokens are padding. Of a masked completion (truncated, with `mask_truncated_completions`) it
    tells nothing, so that trailing padding is removed by its id.
    """
    names = "prompt_ids", "prompt_mask", "completion_ids", "completion_mask"
    prompts, prompt_masks, completions, completion_masks = (inputs[name].tolist() for name in names)
    rows = []
    for prompt, prompt_mask, completion, mask in zip(prompts, prompt_masks, completions, completion_masks, strict=True):
        own = tuple(token for token, kept in zip(prompt, prompt_mask, strict=True) if kept)
        masked = not any(mask)
        kept = completion if masked else [token for token, counts in zip(completion, mask, strict=True) if counts]
        rows.append(LossRow(own, _stripped(kept, pad_id) if masked else tuple(kept), masked))
    return rows


def match_rows(sampled: Sequence[SampledRow], rows: Sequence[LossRow], pad_id: int) -> list[int | None]:
    """Return the place in `sampled` of each row of the loss; None where none or several groups hold the same tokens.

    Rows of one group with equal tokens are interchangeable, for influence is summed over the group. An environment or a
    rollout function may write prompts of its own: these rows are found by their completions alone.
    """
    prompts = {row.prompt for row in sampled}
    whole: dict[tuple[Tokens | None, Tokens], list[int]] = {}
    stripped: dict[tuple[Tokens | None, Tokens], list[int]] = {}
    for place, row in enumerate(sampled):
        for prompt in (row.prompt, None):
            whole.setdefault((prompt, row.completion), []).append(place)
            stripped.setdefault((prompt, _stripped(row.completion, pad_id)), []).append(place)
    found: list[int | None] = []
    taken: set[int] = set()
    for read in rows:
        prompt = read.prompt if read.prompt in prompts else None
        places = (stripped if read.masked else whole).get((prompt, read.completion), [])
        free = [place for place in places if place not in taken]
        alone = bool(free) and len({sampled[place].group for place in places}) == 1
        found.append(free[0] if alone else None)
        taken.update(free[:1] if alone else ())
    return found


def _stripped(tokens: Sequence[int], pad_id: int) -> Tokens:
    end = len(tokens)
    while end and tokens[end - 1] == pad_id:
        end -= 1
    return tuple(tokens[:end])


# -- the normaliser of a loss --------------------------------------------------------------------------------------

BY_SEQUENCE = ("grpo", "sapo")  # each completion is divided by its own length, as part of the estimator
BY_ROWS = (*BY_SEQUENCE, "dr_grpo", "luspo")
BY_BATCH = ("dapo", "cispo", "vespo")


@dataclass(frozen=True)
class LossNormalizer:
    """The factor from a row's part of TRL's loss to its part of the group's surrogate.

    The surrogate of a group of K completions is sum_k A_k sum_t rho_kt / (K Z), with Z the length of completion k for
    `grpo` and `sapo`, else the largest completion length. Where TRL divides the loss:

        grpo, sapo   B a |o_k|   B rows of the micro-batch, a micro-steps in an optimiser step
        dr_grpo      B a L       L the largest completion length
        luspo        B a
        bnpo         a M         M tokens that count in the micro-batch
        dapo, cispo, vespo       a tokens of the generation batch / (processes x steps per generation)

    `cispo` weighs tokens by ratios that are cut at `epsilon_high`, even where that is below 1, as by default.
    """

    settings: GRPOConfig
    processes: int

    def __post_init__(self) -> None:
        """ValueError for a loss that is not known."""
        if self.settings.loss_type not in (*BY_ROWS, *BY_BATCH, "bnpo"):
            raise ValueError(f"the normaliser of the loss {self.settings.loss_type!r} is not known")

    def factor(self, inputs: Mapping[str, Tensor], accumulated: int) -> float:
        """The factor of a micro-batch, one of `accumulated` in its optimiser step."""
        loss, longest = self.settings.loss_type, self.settings.max_completion_length
        generations = self.settings.num_generations
        if loss in BY_ROWS:
            unit = 1 if loss in (*BY_SEQUENCE, "dr_grpo") else longest
            return len(inputs["completion_ids"]) * accumulated / (generations * unit)
        if loss == "bnpo":
            mask = inputs["completion_mask"]
            counted = float((mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).sum())
            return max(counted, 1.0) * accumulated / (generations * longest)
        items = max(float(inputs["num_items_in_batch"]), 1.0) / self.processes
        if loss == "cispo":
            high = self.settings.epsilon_high
            items /= min(1.0, self.settings.epsilon if high is None else high)
        return items * accumulated / self.settings.steps_per_generation / (generations * longest)
