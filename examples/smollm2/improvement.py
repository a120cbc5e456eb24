"""Does influence predict improvement on SmolLM2? Take a small step on a batch of prompts and measure what it does.

For each batch, 16 prompts of one kind or of the whole pool, the script samples 8 completions of each and computes
the batch's GRPO gradient g. The prediction is its influence: the cosine of g and the validation direction D. Then it
moves the weights by a fixed length along g and measures the change of the mean reward on the validation prompts by
importance weighting completions that had no part in D:

    J(theta') - J(theta) = mean over completions of (r - mean of the others) * (pi_theta'(x) / pi_theta(x) - 1).

It needs the completions that `direction.py measure --step 0` has left in its folder, writes a line for each batch to
`improvement.jsonl` there, and goes on where it was stopped. `--table` prints rank correlations with 95 % bootstrap
intervals over batches, and means by kind, from the lines there.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from direction import centred
from grpo import Group, Policy, Question, Row, log_probs, pack
from torch import Tensor

from cropi.lab.audit.agreement import spearman

KINDS = ("two-step", "two-step", "one-step", "all", "gsm8k", "divisors")  # of batch n: KINDS[n % 6]
PROMPTS, COMPLETIONS = 16, 8
MEASURED = 16  # completions of each validation prompt that measure; those before them give the direction


def direction(policy: Policy, groups: Sequence[Group]) -> list[Tensor]:
    """The mean gradient of the expected reward, by parameter."""
    policy.optimizer.zero_grad()
    for group in groups:
        packed = pack([Row(group.question.prompt, group.completions, centred(group.rewards))])
        with torch.autocast("cpu", torch.bfloat16):
            logs = log_probs(policy.model, packed)
        ((packed.weights_T * logs).sum() / len(group.completions) / len(groups)).backward()
    found = [p.grad.clone() for p in policy.model.parameters()]
    policy.optimizer.zero_grad()
    return found


@torch.no_grad()
def sums(policy: Policy, groups: Sequence[Group]) -> Any:
    """Log-probability of every completion, prompts x completions."""
    found = []
    for group in groups:
        packed = pack([Row(group.question.prompt, group.completions, [0.0] * len(group.completions))])
        with torch.autocast("cpu", torch.bfloat16):
            logs = log_probs(policy.model, packed)
        found.append([float(part.sum()) for part in logs.split([len(c) for c in group.completions])])
    return np.array(found)


def change(before: Any, after: Any, weights: Any) -> tuple[float, float]:
    """The change of the mean reward and its standard error over prompts."""
    by_prompt = (weights * np.expm1(after - before)).mean(1)
    return float(by_prompt.mean()), float(by_prompt.std(ddof=1) / len(by_prompt) ** 0.5)


def batch(pool: Sequence[Question], number: int) -> list[Question]:
    kind = KINDS[number % len(KINDS)]
    members = [question for question in pool if kind in ("all", question.source)]
    chosen = np.random.default_rng([7, number]).permutation(len(members))[:PROMPTS]
    return [members[n] for n in chosen]


def tried(
    policy: Policy,
    groups: Sequence[Group],
    aim: Sequence[Tensor],
    measure: tuple[Sequence[Group], Any, Any],
    step: float,
) -> dict[str, float]:
    """Influence of the groups and the change of the validation reward after a step of length `step` along them."""
    measured, before, weights = measure
    parameters = list(policy.model.parameters())
    policy.optimizer.zero_grad()
    policy.accumulate(groups)
    update = [-p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    norm = sum(float(u.square().sum()) for u in update) ** 0.5
    dot = sum(float((u * a).sum()) for u, a in zip(update, aim, strict=True))
    aimed = sum(float(a.square().sum()) for a in aim) ** 0.5
    if norm == 0:
        return {"cosine": 0.0, "dot": 0.0, "norm": 0.0, "change": 0.0, "error": 0.0}
    saved = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, u in zip(parameters, update, strict=True):
            p.add_(u, alpha=step / norm)
        gained, error = change(before, sums(policy, measured), weights)
        for p, old in zip(parameters, saved, strict=True):
            p.copy_(old)
    return {"cosine": dot / norm / aimed, "dot": dot, "norm": norm, "change": gained, "error": error}


def table(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rank correlation of each prediction with the change, and means by kind of batch."""
    changes = np.array([line["change"] for line in lines])
    generator = np.random.default_rng(0)
    drawn = [generator.integers(0, len(lines), len(lines)) for _ in range(2000)]
    found: list[dict[str, Any]] = []
    for name in ("cosine", "dot", "learnability"):
        values = np.array([line[name] for line in lines])
        interval = np.nanquantile([spearman(values[rows], changes[rows]) for rows in drawn], [0.025, 0.975])
        correlation = round(spearman(values, changes), 3)
        found.append({"prediction": name, "spearman": correlation, "interval": interval.round(2).tolist()})
    for kind in dict.fromkeys(line["kind"] for line in lines):
        own = [line for line in lines if line["kind"] == kind]
        means = {name: round(float(np.mean([line[name] for line in own])), 4) for name in ("cosine", "change")}
        found.append({"kind": kind, "batches": len(own)} | means)
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the policy")
    parser.add_argument("--data", type=Path, help="folder written by pool.py")
    parser.add_argument("--output", type=Path, required=True, help="folder of `direction.py measure --step 0`")
    parser.add_argument("--batches", type=int, default=30, help="default: 30")
    parser.add_argument("--step", type=float, default=0.1, help="length of the step in weight space (default: 0.1)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after these minutes")
    parser.add_argument("--table", action="store_true", help="print the table of what was measured")
    arguments = parser.parse_args()
    if not arguments.table and (arguments.model is None or arguments.data is None):
        parser.error("give --model and --data, or --table")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    log = arguments.output / "improvement.jsonl"
    if arguments.table:
        for line in table([json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]):
            print(json.dumps(line))
        return
    torch.set_num_threads(1)
    started = time.monotonic()
    policy = Policy(arguments.model, learning_rate=0.0, longest=48, seed=0)
    pool = policy.questions(arguments.data / "niche" / "train.jsonl")
    questions = policy.questions(arguments.data / "validation.jsonl")
    stored = json.loads((arguments.output / "fresh-0.json").read_text(encoding="utf-8"))["validation"]["groups"]
    groups = [Group(question, *group) for question, group in zip(questions, stored, strict=True)]
    aim = direction(policy, [Group(g.question, g.completions[:-MEASURED], g.rewards[:-MEASURED]) for g in groups])
    measured = [Group(g.question, g.completions[-MEASURED:], g.rewards[-MEASURED:]) for g in groups]
    weights = np.array([centred(group.rewards) for group in measured])
    before = sums(policy, measured)
    done = len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0
    for number in range(done, arguments.batches):
        if time.monotonic() - started > 60 * arguments.minutes:
            return
        generator = torch.Generator().manual_seed(number)
        sampled = policy.sample(batch(pool, number), COMPLETIONS, generator=generator)
        rates = np.array([group.pass_rate for group in sampled])
        line = {"kind": KINDS[number % len(KINDS)], "learnability": round(float((rates * (1 - rates)).mean()), 4)}
        line |= tried(policy, sampled, aim, (measured, before, weights), arguments.step)
        print(json.dumps(line), flush=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
