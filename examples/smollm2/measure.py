"""Sample a model on word problems and print pass rate, completion length, truncation and speed."""

import argparse
import os
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from worked import split_rows

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


@dataclass(frozen=True)
class Completion:
    """One sampled completion: its text without EOS, its length with EOS, and whether it ended by itself."""

    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class Measurement:
    """Verdicts and completions of N questions with K completions each, and the seconds sampling took."""

    passed_NK: list[list[bool]]
    completions: list[Completion]
    seconds: float

    def line(self) -> str:
        """Everything on one line; the interval is one standard error over questions."""
        rates_N = torch.tensor(self.passed_NK, dtype=torch.float64).mean(1)
        lengths = torch.tensor([completion.tokens for completion in self.completions])
        error = rates_N.std().item() / len(rates_N) ** 0.5 if len(rates_N) > 1 else float("nan")
        mixed = ((rates_N > 0) & (rates_N < 1)).double().mean().item()
        truncated = sum(not completion.finished for completion in self.completions) / len(self.completions)
        marked = sum("####" in completion.text for completion in self.completions) / len(self.completions)
        parts = [
            f"{len(rates_N)} questions, pass rate {rates_N.mean().item():.3f} ± {error:.3f}",
            f"with #### {marked:.2f}",
            f"median length {lengths.median().item()}",
            f"truncated {truncated:.3f}",
            f"{lengths.sum().item() / self.seconds:.0f} generated tokens/s",
        ]
        if len(self.passed_NK[0]) > 1:
            parts.insert(1, f"mixed groups {mixed:.2f}")
        return ", ".join(parts)


def chat(question: str) -> list[dict[str, str]]:
    """The prompt of the RL run: an empty system message (16 tokens fewer than the template's own) and the question."""
    return [{"role": "system", "content": ""}, {"role": "user", "content": question}]


def read_questions(
    path: Path, hash_range: tuple[float, float], *, count: int | None, seed: int
) -> list[dict[str, str]]:
    """`question`/`answer` rows of a hash range, as cropi splits them; a seeded sample of `count` if given."""
    rows = split_rows(path, hash_range)
    if count is None or count >= len(rows):
        return rows
    return random.Random(seed).sample(rows, count)


def final_number(text: str) -> float | None:
    """The last number after the last `####`, or None where there is none."""
    _, mark, tail = text.rpartition("####")
    numbers = NUMBER.findall(tail) if mark else []
    return float(numbers[-1].replace(",", "")) if numbers else None


def is_correct(text: str, answer: str) -> bool:
    number = final_number(text)
    return number is not None and abs(number - float(answer.replace(",", ""))) < 1e-4


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    max_completion: int,
    batch_size: int,
) -> list[Completion]:
    """Sample one completion a question at T = 1 from the whole distribution (no top-k, no top-p)."""
    completions = []
    for start in range(0, len(questions), batch_size):
        inputs = tokenizer.apply_chat_template(
            [chat(question) for question in questions[start : start + batch_size]],
            add_generation_prompt=True,
            padding=True,
            tokenizer_kwargs={"padding_side": "left"},
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(
            **inputs,
            max_new_tokens=max_completion,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
            finished = tokenizer.eos_token_id in ids
            length = ids.index(tokenizer.eos_token_id) + 1 if finished else len(ids)
            text = tokenizer.decode(ids[:length], skip_special_tokens=True)
            completions.append(Completion(text=text, tokens=length, finished=finished))
    return completions


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, str]],
    *,
    group_size: int = 1,
    max_completion: int = 64,
    batch_size: int = 64,
    seed: int = 0,
) -> Measurement:
    """Sample `group_size` completions for each row and check them."""
    set_seed(seed)
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    questions = [row["question"] for row in rows for _ in range(group_size)]
    completions = sample(model, tokenizer, questions, max_completion=max_completion, batch_size=batch_size)
    seconds = time.perf_counter() - started
    model.train(was_training)
    groups = [completions[n : n + group_size] for n in range(0, len(completions), group_size)]
    passed_NK = [
        [is_correct(completion.text, row["answer"]) for completion in group]
        for row, group in zip(rows, groups, strict=True)
    ]
    return Measurement(passed_NK=passed_NK, completions=completions, seconds=seconds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder written by convert.py or warm_start.py")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSONL files of `question` and `answer`")
    parser.add_argument(
        "--hash-range", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"), help="default: all rows"
    )
    parser.add_argument("--questions", type=int, help="questions sampled from each file (default: all in the range)")
    parser.add_argument("--group-size", type=int, default=1, help="completions of each question (default: 1)")
    parser.add_argument("--max-completion", type=int, default=64, help="tokens (default: 64)")
    parser.add_argument("--batch-size", type=int, default=64, help="completions at a time (default: 64)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and of sampling (default: 0)")
    parser.add_argument("--show", type=int, default=0, help="completions to print from each file (default: 0)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=DTYPES[arguments.dtype])
    for path in arguments.data:
        rows = read_questions(path, tuple(arguments.hash_range), count=arguments.questions, seed=arguments.seed)
        measurement = measure(
            model,
            tokenizer,
            rows,
            group_size=arguments.group_size,
            max_completion=arguments.max_completion,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
        )
        print(f"{path.name}: {measurement.line()}", flush=True)
        for n in range(min(arguments.show, len(rows))):
            completion = measurement.completions[n * arguments.group_size]
            print(f"  Q: {rows[n]['question']} (answer {rows[n]['answer']})\n  A: {completion.text!r}")


if __name__ == "__main__":
    main()
