"""Time sampling and a training step on one core: `generate` against `decode.py`, TRL's step against `grpo.py`.

Both of a pair are measured alternately in one process. Ratios are what to read: bare times differ by machine.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from decode import left_padded, sample
from grpo import Group, Policy, Question
from task import chat
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import GRPOConfig, GRPOTrainer

LONGEST = 64  # tokens of a completion
BATCH = 64  # rows of `generate`


def generated(model: Any, prompts: list[list[int]], eos: int, pad: int) -> list[list[int]]:
    """Completions by transformers, in batches."""
    found = []
    settings = GenerationConfig(
        max_new_tokens=LONGEST, do_sample=True, temperature=1.0, top_k=0, eos_token_id=eos, pad_token_id=pad
    )
    for start in range(0, len(prompts), BATCH):
        ids, mask = left_padded(prompts[start : start + BATCH], pad)
        output = model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=settings)
        rows = output[:, ids.shape[1] :].tolist()
        found += [row[: row.index(eos) + 1] if eos in row else row for row in rows]
    return found


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def trl_inputs(groups: list[Group], pad: int) -> dict[str, Any]:
    """The groups as a generation batch of TRL's."""
    ids, mask = left_padded([group.question.prompt for group in groups for _ in group.completions], pad)
    completions = [completion for group in groups for completion in group.completions]
    longest = max(map(len, completions))
    padded = torch.tensor([row + [pad] * (longest - len(row)) for row in completions])
    kept = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in completions])
    advantages = torch.cat([group.advantages() for group in groups])
    named = {"prompt_ids": ids, "prompt_mask": mask.long(), "completion_ids": padded, "completion_mask": kept}
    return named | {"advantages": advantages, "num_items_in_batch": kept.sum()}


def trl_trainer(path: Path, tokenizer: Any, rows: int, folder: str) -> GRPOTrainer:
    arguments = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=True,
        gradient_checkpointing=False,
        per_device_train_batch_size=rows,
        max_completion_length=LONGEST,
        loss_type="dr_grpo",
        report_to=[],
    )
    made = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 8),
        args=arguments,
    )
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def trl_step(made: GRPOTrainer, inputs: dict[str, Any]) -> None:
    made.model.zero_grad()
    made.compute_loss(made.model, dict(inputs)).backward()


def own_step(policy: Policy, groups: list[Group]) -> None:
    policy.optimizer.zero_grad()
    policy.accumulate(groups)


def sampling(
    path: Path, prompts: list[list[int]], eos: int, pad: int, rounds: int
) -> tuple[list[float], list[list[int]]]:
    """(ratios of tokens per second but the first, the last completions)."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    ratios: list[float] = []
    completions: list[list[int]] = []
    common = {"max_new_tokens": LONGEST, "eos": [eos], "pad": pad, "temperature": 1.0}
    common["generator"] = torch.Generator().manual_seed(0)
    for number in range(rounds):
        slow, plain = timed(lambda: generated(model, prompts, eos, pad))
        fast, completions = timed(lambda: sample(model, prompts, **common))
        rates = [sum(map(len, rows)) / seconds for rows, seconds in ((plain, slow), (completions, fast))]
        ratios += [rates[1] / rates[0]] if number else []
        print(f"sampling: generate {rates[0]:.0f}, decode {rates[1]:.0f} tokens/s, {rates[1] / rates[0]:.2f} times")
    return ratios, completions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder written by warm_start.py")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with `question`")
    parser.add_argument("--completions", type=int, default=256, help="8 of each question (default: 256)")
    parser.add_argument("--step-completions", type=int, default=64, help="of a training step (default: 64)")
    parser.add_argument("--rounds", type=int, default=4, help="the first is left out (default: 4)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    questions = [json.loads(line)["question"] for line in arguments.data.read_text(encoding="utf-8").splitlines()]
    encoded = tokenizer.apply_chat_template(
        [chat(question) for question in questions[: arguments.completions // 8]],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    prompts = [prompt for prompt in encoded for _ in range(8)]
    rates, completions = sampling(arguments.model, prompts, eos, pad, arguments.rounds)
    groups = [  # all mixed: that groups of equal rewards are left out is not measured
        Group(Question("", "", "", tuple(prompts[n])), completions[n : n + 8], [0.0, 1.0] * 4)
        for n in range(0, arguments.step_completions, 8)
    ]
    inputs, ratios = trl_inputs(groups, pad), []
    policy = Policy(arguments.model, learning_rate=0.0, longest=LONGEST, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        plain = trl_trainer(arguments.model, tokenizer, arguments.step_completions, folder)
        for number in range(arguments.rounds):
            slow, fast = timed(lambda: trl_step(plain, inputs))[0], timed(lambda: own_step(policy, groups))[0]
            ratios += [slow / fast] if number else []
            print(f"step: TRL {slow:.1f} s, shared {fast:.1f} s, {slow / fast:.2f} times", flush=True)
    step, sampled = statistics.median(ratios), statistics.median(rates)
    print(f"median over {len(ratios)} rounds: sampling {sampled:.2f} times, step {step:.2f} times")


if __name__ == "__main__":
    main()
