"""Teach a converted SmolLM2 to answer a word problem by a short worked solution ending with `#### N`.

GRPO learns only from prompts that the policy solves sometimes. The converted model hardly ever writes
`####`, so its rewards are all 0. Supervised training on short worked solutions (worked.py makes them from
MAWPS; GSM8K's own have the same format) teaches it to answer in the way that the reward reads.
"""

import argparse
import json
import os
import random
import re
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from task import chat
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

CALCULATOR_MARK = re.compile(r"<<.*?>>")  # GSM8K only


def worked_solutions(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, max_completion: int, count: int | None, seed: int
) -> list[dict[str, list[int]]]:
    """Rows whose solution, with EOS, has at most `max_completion` tokens; a seeded sample if `count` is given.

    Rows are tokenised here and not by SFTTrainer: prompts are rendered as GRPO renders them, and the completion
    ends at EOS, where the chat template would add a line break that sampling never produces.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    examples = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(chat(row["question"]), add_generation_prompt=True, return_dict=True)
        solution = CALCULATOR_MARK.sub("", row["answer"])
        completion = [*tokenizer(solution, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(completion) <= max_completion:
            mask = [0] * len(prompt["input_ids"]) + [1] * len(completion)
            examples.append({"input_ids": prompt["input_ids"] + completion, "completion_mask": mask})
    if count is None:
        return examples
    if len(examples) < count:
        raise SystemExit(f"{path}: {len(examples)} solutions of at most {max_completion} tokens, {count} asked for")
    return random.Random(seed).sample(examples, count)


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
    # Weights stay fp32 under autocast, so that small updates are not rounded away.
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    examples = worked_solutions(
        arguments.data,
        tokenizer,
        max_completion=arguments.max_completion,
        count=arguments.examples,
        seed=arguments.seed,
    )
    tokens = sum(len(example["input_ids"]) for example in examples)
    print(f"{len(examples)} examples, {tokens:,} tokens an epoch", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            SFTConfig(
                output_dir=folder,
                num_train_epochs=arguments.epochs,
                per_device_train_batch_size=arguments.batch_size,
                learning_rate=arguments.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=5,
                completion_only_loss=True,
                weight_decay=0.0,
                max_grad_norm=1.0,
                train_sampling_strategy="group_by_length",
                bf16=arguments.compute == "bf16",
                use_cpu=not torch.cuda.is_available(),
                gradient_checkpointing=False,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                seed=arguments.seed,
            ),
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
        )
        outcome = trainer.train()
    seconds = outcome.metrics["train_runtime"]
    trained = tokens * arguments.epochs
    print(f"trained on {trained:,} tokens in {seconds:.0f} s: {trained / seconds:.0f} tokens/s")
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"bf16 model written to {arguments.output}")


if __name__ == "__main__":
    main()
