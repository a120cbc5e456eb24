"""The fast sampler and the training step of the SmolLM2 example, on the built-in policy."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from decode import sample
from grpo import Policy
from speed import trl_inputs
from tests.examples.sampled_groups import groups_of, questions
from tests.runs import grpo_args
from transformers import GenerationConfig
from trl import GRPOTrainer

from cropi.builtin import POLICY_DIR


@pytest.fixture
def own() -> Policy:
    return Policy(POLICY_DIR, learning_rate=1e-3, longest=16, seed=0, bf16=False)


def test_greedy_completions_are_those_of_generate(own: Policy) -> None:
    """Prompts of several lengths, each twice; rows end at different tokens and leave the batch."""
    prompts = [list(question.prompt) for question in questions(own, 12) for _ in range(2)]
    eos, pad = own.tokenizer.eos_token_id, own.tokenizer.pad_token_id
    settings = GenerationConfig(max_new_tokens=24, eos_token_id=eos, pad_token_id=pad, do_sample=False)
    expected = [own.sampler.generate(torch.tensor([ids]), generation_config=settings)[0, len(ids) :] for ids in prompts]
    options: dict[str, Any] = {"max_new_tokens": 24, "eos": [eos], "pad": pad, "generator": torch.Generator()}
    found = sample(own.sampler, prompts, temperature=None, **options)
    assert len({len(completion) for completion in found}) > 4
    assert found == [completion.tolist() for completion in expected]


def test_samples_follow_the_policy(own: Policy) -> None:
    """4,000 first tokens at T = 0.7: how often each comes is within 4.5 standard deviations of its chance."""
    prompt, count = list(questions(own, 1)[0].prompt), 4000
    ends: dict[str, Any] = {"eos": [own.tokenizer.eos_token_id], "pad": own.tokenizer.pad_token_id}
    generator = torch.Generator().manual_seed(0)
    drawn = sample(own.sampler, [prompt] * count, max_new_tokens=1, temperature=0.7, generator=generator, **ends)
    with torch.no_grad():
        chances = (own.model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1).tolist()
    counts = Counter(completion[0] for completion in drawn)
    assert len(counts) > 2
    for token, chance in enumerate(chances):
        assert abs(counts[token] - count * chance) < 4.5 * (count * chance * (1 - chance)) ** 0.5 + 1, token


def flat(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_step_has_the_gradient_of_trl(tmp_path: Path, own: Policy) -> None:
    """Loss and gradient of one generation batch: TRL's own, a row for each completion, against packed prompts."""
    groups = groups_of(own, 4)
    sizes = {"per_device_train_batch_size": 8 * len(groups), "max_completion_length": 16}
    made = GRPOTrainer(
        model=str(POLICY_DIR),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": question.text} for question in questions(own, 8)]),
        args=grpo_args(tmp_path, **sizes, loss_type="dr_grpo", beta=0.0),
    )
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    loss = made.compute_loss(made.model, trl_inputs(groups, own.tokenizer.pad_token_id))
    loss.backward()
    found = own.accumulate(groups, tokens=200)
    assert found == pytest.approx(float(loss.detach()), rel=1e-5)
    expected = flat(made.model)
    assert expected.norm() > 0.001
    assert float((flat(own.model) - expected).norm() / expected.norm()) < 1e-5
