"""Forward passes of a policy: prompts that are computed once, their hidden states, and log-probs of completions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cropi.functional.surrogate import token_logprobs

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, on a GPU or for torch's allocator on the CPU, whose error has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def shared_prefixes(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Cache]:
    """Compute the keys and values of left-padded prompts once for each distinct prompt, as arguments of `generate`.

    They cover all tokens but the last. Empty if no prompt is repeated, or if the model's cache holds more than that.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    # padding is told apart by the mask: its token may also be part of a prompt
    rows_UT, place_B = torch.where(mask_BT > 0, ids_BT, -1).unique(dim=0, return_inverse=True)
    if len(rows_UT) == len(ids_BT) or ids_BT.shape[1] == 1 or not model._supports_default_dynamic_cache():
        return {}
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return {}  # subclasses keep the states of convolutions and recurrences as well
    mask_UT = (rows_UT >= 0).long()
    model(
        input_ids=rows_UT.clamp(min=0)[:, :-1],
        attention_mask=mask_UT[:, :-1],
        position_ids=(mask_UT.cumsum(-1) - 1).clamp(min=0)[:, :-1],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_select_indices(place_B)
    return {"past_key_values": cache}


def longest_alike(model: nn.Module) -> float:
    """Return the length up to which rotary positions do not depend on the length of the sequence.

    Those of the types `dynamic` and `longrope` do so beyond the length of the original model.
    """
    bounds = [math.inf]
    for module in model.modules():
        rotary: Any = module
        kinds = getattr(rotary, "rope_type", None)
        for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind == "longrope":
                parameters = rotary.config.rope_parameters
                parameters = parameters if layer is None else parameters[layer]
                bounds.append(parameters["original_max_position_embeddings"])
            elif kind is not None and "dynamic" in kind:
                bounds.append(rotary.original_max_seq_len)
    return min(bounds)


@torch.no_grad()
def mean_hidden_states(
    model: nn.Module, prompts: Sequence[Sequence[int]], depth: float = 1.0
) -> list[Float[np.ndarray, " E"]]:
    """Mean hidden state of each prompt, float32, of the layer at a depth from 0, the embeddings, to 1, the last.

    Padding follows the prompt, so under a causal mask it changes nothing.
    """
    device, width = next(model.parameters()).device, max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device)
    layers = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    hidden = layers[min(round(depth * len(layers)), len(layers) - 1)]
    rows = zip(prompts, hidden, strict=True)
    return [states_TE[: len(prompt)].float().mean(dim=0).cpu().numpy() for prompt, states_TE in rows]


def completion_logprobs(
    model: nn.Module, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs that a model gives to completion tokens, by one teacher-forced forward pass.

    Returns (logprobs_KT float32 or wider, mask_KT bool), padded on the right to the longest completion; entries outside
    the mask are 0. Padding follows prompt and completion, so that under a causal mask no row depends on it. No
    attention mask is needed.
    """
    device = next(model.parameters()).device
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(len(row) for row in rows)
    if len(rows) > 1 and width > longest_alike(model):
        pairs = zip(prompts, completions, strict=True)
        alone = [completion_logprobs(model, [p], [c], temperature=temperature) for p, c in pairs]
        logprobs_KT, mask_KT = (
            pad_sequence([part[0] for part in parts], batch_first=True) for parts in zip(*alone, strict=True)
        )
        return logprobs_KT, mask_KT
    longest = max(1, max(len(completion) for completion in completions))
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    logits = model(input_ids=input_ids, use_cache=False).logits
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]
    offsets = torch.arange(longest, device=device)[None]
    mask_KT = offsets < (lengths[:, None] - starts)
    positions = (starts + offsets).clamp(max=width - 1)  # of the tokens themselves; their logits stand one before
    rows_index = torch.arange(len(rows), device=device)[:, None]
    picked = logits[rows_index, positions - 1]
    logprobs_KT = token_logprobs(picked, input_ids[rows_index, positions], temperature=temperature)
    return torch.where(mask_KT, logprobs_KT, torch.zeros_like(logprobs_KT)), mask_KT
