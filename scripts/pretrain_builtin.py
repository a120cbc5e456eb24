"""Train the embedded policy from nothing, and measure how often it passes.

    python scripts/pretrain_builtin.py                  # train, write src/cropi/builtin/policy, print the table
    python scripts/pretrain_builtin.py --evaluate-only  # print the table of the packaged policy
    python scripts/pretrain_builtin.py --output policies/large --hidden-size 384 --layers 6 --lr 1e-3 --device cuda

The corpus has two parts. First the policy learns to work problems out: every completion is step by step. Then it
acquires habits: in family f a fixed share `STEP_SHARE[f]` of completions is step by step and right. Of the others,
`HASTY_SHARE` are hasty, ``answer X`` with X a guess, and the rest are careless: they open in the style of other
families and then work through some other problem of the family, so that they too are right by chance only. So RL has
something to amplify in each family, to a different degree, and what it amplifies in one style is a bad habit in
another. Only prompts of the train split are seen; the loss is on the completion.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cropi.builtin import FAMILIES, POLICY_DIR, generate
from cropi.builtin.dataset import split_of
from cropi.builtin.families import (
    MAX_LENGTH,
    MIN_LENGTH,
    STYLES,
    VOCABULARY,
    Difficulty,
    Problem,
    draw,
    guess,
)

# The share of completions that are step by step, in the right style. Low leaves RL room; high is nearly solved.
STEP_SHARE = {
    "sum": 0.20,
    "alternate": 0.25,
    "product": 0.50,
    "horner": 0.15,
    "parity": 0.15,
    "maximum": 0.75,
    "count": 0.30,
    "machine": 0.20,
    "shell": 0.35,
    "depth": 0.70,
    "compass": 0.15,
    "elevator": 0.10,
    "runs": 0.45,
    "hop": 0.25,
    "median": 0.40,
    "reverse": 0.12,
}
HASTY_SHARE = 0.25
CARELESS_STYLE = {"steps": "tally", "tally": "trace", "trace": "list", "list": "steps"}
SPECIAL_WORDS = ("<pad>", "<eos>", "<unk>")
IGNORED = -100  # label of a token that carries no loss
# So many batches are drawn together and sorted by prompt length, to save padding. Not by total length: hasty
# sequences are short, and batches of them alone would weigh more in a mean over tokens than their share.
CHUNK = 4
OTHER_MODULUS_SHARE = 0.25
MAX_NEW_TOKENS = 32
EVALUATION_SEED = 1_000


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; nothing added on encode; words joined by single spaces on decode."""
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate((*SPECIAL_WORDS, *VOCABULARY))}, unk_token="<unk>")  # noqa: S106
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",  # noqa: S106
        eos_token="<eos>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_policy(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int) -> LlamaForCausalLM:
    """A Llama: 0.86 M parameters with 128 and 4, 11.6 M with 384 and 6."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    policy = LlamaForCausalLM(config)
    policy.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return policy


def pretraining_level(family: str, rng: random.Random) -> Difficulty:
    """The default difficulty and its surroundings: one longer, down to short ones, sometimes another modulus."""
    default = FAMILIES[family].default
    modulus = default.modulus
    if modulus is not None and rng.random() < OTHER_MODULUS_SHARE:
        modulus = rng.randint(3, 9)
    shortest = rng.choice([MIN_LENGTH, default.min_length])
    return Difficulty(shortest, min(default.max_length + 1, MAX_LENGTH), modulus)


def completion(problem: Problem, level: Difficulty, rng: random.Random, habits: bool) -> str:
    """The right steps; with habits, only as often as the family's share says."""
    if not habits or rng.random() < STEP_SHARE[problem.family]:
        return problem.steps
    if rng.random() < HASTY_SHARE:
        return f"answer {guess(problem, rng, level)}"
    _, *words = draw(problem.family, rng, level).steps.split()
    return " ".join([CARELESS_STYLE[STYLES[problem.family]], *words])


def train_sequence(tokens: dict[str, int], rng: random.Random, habits: bool) -> tuple[list[int], int]:
    """Token ids of prompt + completion + eos on a train-split problem, and the prompt's length."""
    family = rng.choice(list(FAMILIES))
    level = pretraining_level(family, rng)
    while split_of(problem := draw(family, rng, level)) != "train":
        pass
    prompt = problem.prompt.split()
    words = [*prompt, *completion(problem, level, rng, habits).split(), "<eos>"]
    return [tokens[word] for word in words], len(prompt)


def train_batches(tokens: dict[str, int], batch_size: int, rng: random.Random, first_habit: int) -> Iterator[tuple]:
    """Endless (input ids, labels), each (batch, T), padded on the right; habits from batch `first_habit` on."""
    step = 0
    while True:
        habits = step >= first_habit
        chunk = [train_sequence(tokens, rng, habits) for _ in range(CHUNK * batch_size)]
        chunk.sort(key=lambda sequence: sequence[1])
        starts = list(range(0, len(chunk), batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield collate(chunk[start : start + batch_size], tokens["<pad>"])
            step += 1


def collate(sequences: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right; labels are the completion's tokens only."""
    width = max(len(ids) for ids, _ in sequences)
    inputs = torch.full((len(sequences), width), pad)
    labels = torch.full((len(sequences), width), IGNORED)
    for row, (ids, prompt_length) in enumerate(sequences):
        inputs[row, : len(ids)] = torch.tensor(ids)
        labels[row, prompt_length : len(ids)] = inputs[row, prompt_length : len(ids)]
    return inputs, labels


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def pretrain(args: argparse.Namespace, policy: LlamaForCausalLM, tokens: dict[str, int]) -> None:
    """Minimise the completion's cross-entropy with AdamW; prints progress and the time left."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    batches = train_batches(tokens, args.batch_size, random.Random(args.seed), int(args.steps * (1 - args.habit_share)))
    started = time.monotonic()
    policy.train()
    for step, (inputs, labels) in zip(range(args.steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        inputs, labels = inputs.to(policy.device), labels.to(policy.device)
        logits = policy(input_ids=inputs, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            spent = time.monotonic() - started
            left = spent / (step + 1) * (args.steps - step - 1)
            print(f"step {step + 1}/{args.steps}  loss {loss.item():.4f}  {spent:.0f} s, {left:.0f} s left", flush=True)


@torch.no_grad()
def complete(policy, tokenizer, prompts: list[str], *, sample: bool, batch_size: int = 512) -> list[str]:
    """One completion for each prompt, at temperature 1 or greedily, as text without special words."""
    policy.eval()
    texts = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(prompts[start : start + batch_size], padding=True, return_tensors="pt").to(policy.device)
        mode = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
        ids = policy.generate(**batch, **mode, max_new_tokens=MAX_NEW_TOKENS)
        texts += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def passes(text: str, answer: str) -> bool:
    """Whether the text after the last `answer` is the right answer."""
    _, marker, given = f" {text} ".rpartition(" answer ")
    return bool(marker) and given.strip() == answer


def measure(policy, tokenizer, family: str, prompts: int, K: int) -> dict[str, float]:
    """Pass rates of one family over held-out prompts (test split), K samples each, plus greedy accuracy."""
    rows = generate(family, split="test", count=prompts, seed=EVALUATION_SEED)
    answers_NK = [row["answer"] for row in rows for _ in range(K)]
    texts_NK = complete(policy, tokenizer, [row["prompt"] for row in rows for _ in range(K)], sample=True)
    rewards_NK = [passes(text, answer) for text, answer in zip(texts_NK, answers_NK, strict=True)]
    stepwise = [reward for text, reward in zip(texts_NK, rewards_NK, strict=True) if text.startswith(STYLES[family])]
    groups = [sum(rewards_NK[i : i + K]) for i in range(0, len(rewards_NK), K)]
    greedy = complete(policy, tokenizer, [row["prompt"] for row in rows], sample=False)
    right = [passes(text, row["answer"]) for text, row in zip(greedy, rows, strict=True)]
    return {
        "pass_rate": sum(rewards_NK) / len(rewards_NK),
        "step_share": len(stepwise) / len(rewards_NK),
        "pass_rate_stepwise": sum(stepwise) / max(1, len(stepwise)),
        "mixed_groups": sum(0 < passed < K for passed in groups) / len(groups),
        "greedy_accuracy": sum(right) / len(right),
    }


def markdown(table: dict[str, dict[str, float]]) -> str:
    """The table of `measure` by family, with the mean over families as its last row."""
    columns = list(next(iter(table.values())))
    mean = {column: sum(row[column] for row in table.values()) / len(table) for column in columns}
    lines = [f"| family | corpus share | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for family, row in {**table, "mean": mean}.items():
        share = f"{STEP_SHARE[family]:.2f}" if family in STEP_SHARE else ""
        lines.append(f"| {family} | {share} | " + " | ".join(f"{row[column]:.2f}" for column in columns) + " |")
    return "\n".join(lines)


def evaluate(folder: Path, prompts: int, K: int, device: str) -> dict:
    """Measure the policy stored in a folder on every family."""
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(folder).to(device), AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(EVALUATION_SEED)
    families = {family: measure(policy, tokenizer, family, prompts, K) for family in FAMILIES}
    return {"prompts": prompts, "K": K, "temperature": 1.0, "split": "test", "families": families}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=POLICY_DIR, help="folder to write (default: the package's)")
    parser.add_argument("--evaluate-only", action="store_true", help="only print the table of the policy in --output")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu", help="where to train and measure (the packaged one: cpu)")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--habit-share", type=float, default=0.25, help="last share of the steps, which teaches habits")
    parser.add_argument("--prompts", type=int, default=128, help="held-out prompts per family in the table")
    parser.add_argument("--samples", type=int, default=8, help="completions per prompt in the table (K)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # the order of sums, hence the weights, depends on it; a policy this small gains nothing
    if not args.evaluate_only:
        torch.manual_seed(args.seed)
        tokenizer = build_tokenizer()
        policy = build_policy(tokenizer, args.hidden_size, args.layers).to(args.device)
        print(f"{policy.num_parameters():,} parameters, {len(tokenizer)} words")
        pretrain(args, policy, tokenizer.get_vocab())
        policy.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
    rates = evaluate(args.output, args.prompts, args.samples, args.device)
    print(markdown(rates["families"]))
    if not args.evaluate_only:
        (args.output / "pass_rates.json").write_text(json.dumps(rates, indent=2) + "\n")


if __name__ == "__main__":
    main()
