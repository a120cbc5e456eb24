"""Sample many completions on a CPU: finished rows leave the batch, and attention reads its cache without copies.

`generate` keeps every row until the longest one ends, copies the whole cache at every token, and, where no prompt is
padded, takes a path of attention on which a CPU is five times slower. Here a prompt's completions share its forward
pass, keys and values lie in buffers of a fixed size, and rows that have ended are dropped.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

COMPACT_BELOW = 0.9  # share of rows still decoding below which the others are dropped: a copy of the cache


class FixedLayer(CacheLayerMixin):
    """Keys and values of one layer, in buffers that hold `capacity` tokens of each row."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, width = key_states.shape
        self.keys = key_states.new_zeros(rows, heads, self.capacity, width)
        self.values = value_states.new_zeros(rows, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be kept several times."""
        self.keys, self.values = self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (prompts, longest)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    return ids, mask


@torch.inference_mode()
def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos: Sequence[int],
    pad: int,
    temperature: float | None,
    generator: torch.Generator,
) -> list[list[int]]:
    """One completion per prompt, up to and with its first EOS. `temperature` None is greedy."""
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    places = {prompt: place for place, prompt in enumerate(distinct)}
    rows = torch.tensor([places[tuple(prompt)] for prompt in prompts])
    ids, mask = left_padded(distinct, pad)
    width, ends = ids.shape[1], torch.tensor(list(eos))
    layers = [FixedLayer(width + max_new_tokens) for _ in range(model.config.num_hidden_layers)]
    cache = Cache(layers=layers)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids, attention_mask=mask.long(), position_ids=position, past_key_values=cache, logits_to_keep=1
    ).logits[rows, -1]
    for layer in layers:
        layer.select(rows)
    mask = torch.cat([mask[rows], mask.new_ones(len(rows), max_new_tokens)], 1)
    position = position[rows, -1:] + 1
    tokens = torch.full((len(prompts), max_new_tokens), -1)
    active = torch.arange(len(prompts))  # the prompt of each row of the batch
    going = torch.ones(len(prompts), dtype=torch.bool)
    for step in range(max_new_tokens):
        drawn = draw(logits, temperature, generator)
        tokens[active[going], step] = drawn[going]
        going = going & ~torch.isin(drawn, ends)
        if not going.any() or step + 1 == max_new_tokens:
            break
        if going.float().mean() < COMPACT_BELOW:
            kept = going.nonzero()[:, 0]
            active, drawn, mask, position, going = (t[kept] for t in (active, drawn, mask, position, going))
            for layer in layers:
                layer.select(kept)
        seen = mask[:, None, None, : width + step + 1]  # in four dimensions, which keeps attention off its slow path
        logits = model(
            input_ids=drawn[:, None], attention_mask=seen, position_ids=position, past_key_values=cache
        ).logits[:, -1]
        position = position + 1
    return [[token for token in row if token >= 0] for row in tokens.tolist()]


def draw(logits: Tensor, temperature: float | None, generator: torch.Generator) -> Tensor:
    """A token for each row: the first whose cumulative probability exceeds a uniform number, one number a row."""
    if temperature is None:
        return logits.argmax(-1)
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
    uniform = torch.rand(len(logits), 1, generator=generator)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0].clamp_(
        max=logits.shape[-1] - 1
    )
