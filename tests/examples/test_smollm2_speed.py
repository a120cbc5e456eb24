"""The fast sampler and the training step of the SmolLM2 example, on the built-in policy."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import GRPOConfig, GRPOTrainer

from cropi.builtin import POLICY_DIR, generate

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "smollm2"))

from decode import sample
from shared import SharedPromptTrainer


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


def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(c.rpartition("answer ")[2].strip() == a) for c, a in zip(completions, answer, strict=True)]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_the_shared_step_has_the_gradient_of_trl(tmp_path: Path, loss_type: str) -> None:
    """Loss and gradient of one generation batch, TRL's own forward pass against the packed one."""

    def trainer(kind: type[GRPOTrainer]) -> GRPOTrainer:
        arguments = GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=16,
            temperature=0.9,
            beta=0.1,
            loss_type=loss_type,
            report_to=[],
        )
        dataset = Dataset.from_list(problems(8))
        made = kind(model=str(POLICY_DIR), reward_funcs=right, train_dataset=dataset, args=arguments)
        made.current_gradient_accumulation_steps = 1
        made.model.train()
        return made

    torch.manual_seed(0)
    plain, shared = trainer(GRPOTrainer), trainer(SharedPromptTrainer)
    inputs = plain._prepare_inputs(next(iter(plain.get_train_dataloader())))
    losses, gradients = [], []
    for each in (plain, shared):
        loss = each.compute_loss(each.model, dict(inputs))
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in each.model.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert gradients[0].norm() > 0.01
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 1e-5
