"""Teach a converted SmolLM2 to answer a word problem by a short worked solution ending with `#### N`.

GRPO learns only from prompts that the policy solves sometimes. The converted model hardly ever writes
`####`, so its rewards are all 0. Supervised training on short worked solutions (worked.py makes them from
MAWPS; GSM8K's own have the same format) teaches it to answer in the way that the reward reads.
"""

import argparse
import json
import math
import os
import random
import re
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from measure import chat
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

CALCULATOR_MARK = re.compile(r"<<.*?>>")  # GSM8K only
WARMUP_STEPS = 5


class Example(NamedTuple):
    """Token ids of a prompt and its completion, and the length of the prompt."""

    ids: list[int]
    prompt_length: int


def worked_solutions(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, max_completion: int, count: int | None, seed: int
) -> list[Example]:
    """Rows whose solution, with EOS, has at most `max_completion` tokens; a seeded sample if `count` is given.

    Prompts are rendered as GRPO renders them. The completion ends at EOS, where the chat template would add
    a line break that sampling never produces.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    examples = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(chat(row["question"]), add_generation_prompt=True, return_dict=True)
        solution = CALCULATOR_MARK.sub("", row["answer"])
        completion = [*tokenizer(solution, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(completion) <= max_completion:
            examples.append(Example(prompt["input_ids"] + completion, len(prompt["input_ids"])))
    if count is None:
        return examples
    if len(examples) < count:
        raise SystemExit(f"{path}: {len(examples)} solutions of at most {max_completion} tokens, {count} asked for")
    return random.Random(seed).sample(examples, count)


def batches(examples: list[Example], size: int, generator: random.Random) -> list[list[Example]]:
    """All examples once, in batches of like length and in random order, so that little padding is computed."""
    shuffled = generator.sample(examples, len(examples))
    by_length = sorted(shuffled, key=lambda example: len(example.ids))
    result = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    return generator.sample(result, len(result))


def completion_loss(model: PreTrainedModel, batch: list[Example], pad_token_id: int) -> torch.Tensor:
    """Mean cross-entropy over the completion tokens; logits are computed for these alone."""
    longest = max(len(example.ids) for example in batch)
    # B: sequences, T: tokens. Padding is on the right, where causal attention hides it without a mask.
    ids_BT = torch.tensor([[*example.ids, *[pad_token_id] * (longest - len(example.ids))] for example in batch])
    learnt_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, example in enumerate(batch):
        learnt_BT[row, example.prompt_length : len(example.ids)] = True
    hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden_BTD[:, :-1][learnt_BT[:, 1:]])
    return functional.cross_entropy(logits.float(), ids_BT[:, 1:][learnt_BT[:, 1:]])


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    compute: str,
    seed: int,
) -> None:
    """One supervised run on the CPU, with linear warm-up and cosine decay; loss on completions only."""
    generator = random.Random(seed)
    schedule = [batch for _ in range(epochs) for batch in batches(examples, batch_size, generator)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    model.train()
    started, tokens, recent = time.perf_counter(), 0, []
    for step, batch in enumerate(schedule, start=1):
        warm_up = min(1.0, step / WARMUP_STEPS)
        optimizer.param_groups[0]["lr"] = (
            learning_rate * warm_up * (1 + math.cos(math.pi * (step - 1) / len(schedule))) / 2
        )
        # Autocast keeps the weights in fp32, so that small updates are not rounded away.
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bf16"):
            loss = completion_loss(model, batch, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(len(example.ids) for example in batch)
        recent.append(loss.item())
        if step % 10 == 0 or step == len(schedule):
            seconds = time.perf_counter() - started
            mean = sum(recent) / len(recent)
            print(f"step {step}/{len(schedule)}: loss {mean:.3f}, {tokens / seconds:.0f} tokens/s", flush=True)
            recent = []
    print(f"trained on {tokens:,} tokens in {seconds:.0f} s: {tokens / seconds:.0f} tokens/s")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder written by convert.py or by this script")
    parser.add_argument("--data", type=Path, required=True, help="JSONL of `question` and `answer`, a worked solution")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and tokenizer")
    parser.add_argument("--examples", type=int, help="rows to sample (default: all)")
    parser.add_argument("--max-completion", type=int, default=50, help="tokens of a solution (default: 50)")
    parser.add_argument("--epochs", type=int, default=2, help="default: 2")
    parser.add_argument("--batch-size", type=int, default=8, help="default: 8")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="default: 2e-4")
    parser.add_argument("--compute", choices=("bf16", "fp32"), default="bf16", help="in matrix products (bf16)")
    parser.add_argument("--seed", type=int, default=0, help="of the rows and their order (default: 0)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    examples = worked_solutions(
        arguments.data,
        tokenizer,
        max_completion=arguments.max_completion,
        count=arguments.examples,
        seed=arguments.seed,
    )
    completion_tokens = sum(len(example.ids) - example.prompt_length for example in examples)
    print(f"{len(examples)} examples, {sum(len(example.ids) for example in examples):,} tokens an epoch")
    print(f"{completion_tokens / len(examples):.0f} tokens a completion", flush=True)
    train(
        model,
        tokenizer,
        examples,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        compute=arguments.compute,
        seed=arguments.seed,
    )
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"bf16 model written to {arguments.output}")


if __name__ == "__main__":
    main()
