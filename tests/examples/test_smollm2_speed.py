"""The fast sampler and the training step of the SmolLM2 example, on the built-in policy."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests.runs import grpo_args
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import GRPOTrainer

from cropi.builtin import POLICY_DIR, generate

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "smollm2"))

from decode import sample
from grpo import Group, Policy, Question
from speed import trl_inputs


def problems(count: int) -> list[dict[str, str]]:
    rows = [
        row for family in ("sum", "parity", "machine") for row in generate(family, split="train", count=count, seed=0)
    ]
    return [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(POLICY_DIR, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(POLICY_DIR)


def test_greedy_completions_are_those_of_generate(policy: tuple[Any, Any]) -> None:
    """Prompts of several lengths, each twice; rows end at different tokens and leave the batch."""
    model, tokenizer = policy
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in problems(12) for _ in range(2)]
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    settings = {"max_new_tokens": 24, "eos_token_id": eos, "pad_token_id": pad, "do_sample": False}
    expected = []
    for prompt in prompts:
        output = model.generate(torch.tensor([prompt]), generation_config=GenerationConfig(**settings))[
            0, len(prompt) :
        ]
        expected.append(output.tolist())
    found = sample(model, prompts, max_new_tokens=24, eos=[eos], pad=pad, temperature=None, generator=torch.Generator())
    assert len({len(completion) for completion in found}) > 4
    assert found == expected


def test_samples_follow_the_policy(policy: tuple[Any, Any]) -> None:
    """Chi-square of 4,000 first tokens at T = 0.7 against the softmax: below the 99.9 % point of its distribution."""
    model, tokenizer = policy
    prompt = tokenizer(problems(1)[0]["prompt"])["input_ids"]
    drawn = sample(
        model,
        [prompt] * 4000,
        max_new_tokens=1,
        eos=[tokenizer.eos_token_id],
        pad=tokenizer.pad_token_id,
        temperature=0.7,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        expected = 4000 * (model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    counts = Counter(completion[0] for completion in drawn)
    common = [token for token in range(len(expected)) if expected[token] > 5]
    rest = float(expected.sum() - expected[common].sum())
    others = 4000 - sum(counts[token] for token in common)
    statistic = sum((counts[token] - float(expected[token])) ** 2 / float(expected[token]) for token in common)
    statistic += (others - rest) ** 2 / max(rest, 1.0)
    assert statistic < {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5}[len(common)]


@pytest.fixture
def own() -> Policy:
    return Policy(POLICY_DIR, learning_rate=1e-3, longest=16, seed=0, bf16=False)


def groups_of(own: Policy, count: int) -> list[Group]:
    """Sampled groups of 8 with rewards of three kinds; every third group has equal rewards."""
    questions = [
        Question(row["prompt"], row["answer"], "", tuple(own.tokenizer(row["prompt"])["input_ids"]))
        for row in problems(count)
    ]
    sampled = own.sample(questions, 8)
    return [
        replace(group, rewards=[float((n + k) % 3 == 0 and n % 3 > 0) for k in range(8)])
        for n, group in enumerate(sampled)
    ]


def flat(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_step_has_the_gradient_of_trl(tmp_path: Path, own: Policy) -> None:
    """Loss and gradient of one generation batch: TRL's own, a row for each completion, against packed prompts."""
    groups = groups_of(own, 4)
    sizes = {"per_device_train_batch_size": 8 * len(groups), "max_completion_length": 16}
    made = GRPOTrainer(
        model=str(POLICY_DIR),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list(problems(8)),
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
