"""Find the group of each row of a loss: TRL shuffles the rows of a generation batch and gives them no id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

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
