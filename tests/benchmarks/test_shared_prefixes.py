"""Shared prefixes give what every completion gets in a forward pass of its own."""

from __future__ import annotations

import pytest
import torch
from shared_prefixes import SharedPrefixes, make_tree
from tests.gradients.architectures import tiny
from torch import nn

from cropi.errors import PolicyError
from cropi.policy import completion_logprobs

PROMPTS = [
    ([3, 5, 4], [[7, 2, 1], [7, 2, 9], [7, 3], [8], [7, 2, 1]]),
    ([6], [[1, 1, 1, 1, 1, 2], [], [1, 1]]),
    ([2, 2, 3, 4], [[5, 6]]),
]


def test_a_tree_by_hand() -> None:
    tree = make_tree([4, 5], [[7, 8], [7, 9], [], [7]])
    assert tree.tokens == [4, 5, 7, 8, 9]
    assert tree.parents == [-1, 0, 1, 2, 2]
    assert tree.ends == [3, 4, 1, 2]
    with pytest.raises(ValueError, match="needs a prompt"):
        make_tree([], [[1]])


@pytest.mark.parametrize("batch_tokens", [1, 12, 1000])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_log_probs_are_those_of_single_forward_passes(family: str, batch_tokens: int) -> None:
    model: nn.Module = tiny(family).eval()
    shared = SharedPrefixes(model, PROMPTS, temperature=0.7, batch_tokens=batch_tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    for (prompt_ids, completions), found in zip(PROMPTS, shared(), strict=True):
        for completion, value in zip(completions, found, strict=True):
            with torch.no_grad():
                logprobs_KT, _ = completion_logprobs(model, [prompt_ids], [completion], temperature=0.7)
            assert value == pytest.approx(float(logprobs_KT.sum()), abs=1e-4)


def test_a_model_whose_attention_is_not_plain_is_refused() -> None:
    model = tiny("mistral")  # its window is shorter than these completions: it would see other tokens than in a row
    with pytest.raises(PolicyError, match="shared prefixes"):
        SharedPrefixes(model, PROMPTS, temperature=1.0, batch_tokens=100)
