"""Sampling with transformers: prompts that share their forward pass, on small models of several kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from cropi.policy import Policy
from cropi.rollouts.generation import Sampling, TransformersGenerator

SIZES: dict[str, Any] = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TRANSFORMER = SIZES | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**TRANSFORMER),
    "qwen2": Qwen2Config(**TRANSFORMER),
    "gemma3-sliding": Gemma3TextConfig(**TRANSFORMER, head_dim=4, sliding_window=4),
    "gpt2-positions": GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2),
}
# The second and the fourth prompt differ in a token that is also padding.
PROMPTS = [[5, 6, 7], [0, 5, 6, 7, 8], [9], [5, 6, 7, 8], [5, 6, 7], [9], [5, 6, 7, 8], [0, 5, 6, 7, 8], [5, 6, 7]]


def policy(config: Any) -> Policy:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # sharp enough for greedy decoding to hang on the context
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {str(n): n for n in range(3, 32)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return Policy(
        model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    )


class Tokens:
    """Counts the tokens that pass through a model's first layer of embeddings."""

    def __init__(self, model: Any) -> None:
        self.seen: list[tuple[int, ...]] = []
        model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: self.seen.append(inputs[0].shape))


@pytest.mark.parametrize("name", CONFIGS)
def test_shared_prompts_complete_as_each_alone(name: str) -> None:
    """Oracle: greedy completions of every prompt in a batch of its own, which shares and pads nothing."""
    drawn_from = policy(CONFIGS[name])
    greedy = Sampling(12, None)
    tokens = Tokens(drawn_from.model)
    together = TransformersGenerator(drawn_from, 64)(PROMPTS, greedy, seed=1)
    assert tokens.seen[0] == (4, 4), "four distinct prompts but for their last token"
    assert tokens.seen[1] == (9, 1)
    alone = [TransformersGenerator(drawn_from, 1)([prompt], greedy, seed=1)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({tuple(completion) for completion in together}) > 1


def test_samples_of_one_prompt_differ_and_follow_the_policy() -> None:
    """2,000 first tokens against the policy's probabilities: chi-square (31 degrees of freedom) below its 99.9 %."""
    drawn_from = policy(CONFIGS["llama"])
    count = 2000
    drawn = TransformersGenerator(drawn_from, count)([[5, 6, 7]] * count, Sampling(1, 1.0), seed=3)
    observed = torch.bincount(torch.tensor([completion[0] for completion in drawn]), minlength=32).double()
    with torch.no_grad():
        expected = count * drawn_from.model(torch.tensor([[5, 6, 7]])).logits[0, -1].double().softmax(-1)
    assert ((observed - expected) ** 2 / expected).sum() < 61.1


def test_a_model_that_keeps_more_than_keys_and_values_shares_nothing() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8, "state_size": 8}
    drawn_from = policy(Mamba2Config(**SIZES, **sizes, n_groups=1, expand=2))
    tokens = Tokens(drawn_from.model)
    drawn = TransformersGenerator(drawn_from, 64)([[5, 6, 7]] * 3, Sampling(4, 1.0), seed=1)
    assert len(drawn) == 3
    assert tokens.seen[0] == (3, 3)
