"""Questions of the built-in kinds, and groups that a policy of the SmolLM2 example has sampled for them."""

from dataclasses import replace

from grpo import Group, Policy, Question

from cropi.builtin import generate


def questions(policy: Policy, count: int) -> list[Question]:
    """So many of each of three kinds."""
    rows = [row for kind in ("sum", "parity", "machine") for row in generate(kind, split="train", count=count, seed=0)]
    encoded = (tuple(policy.tokenizer(row["prompt"])["input_ids"]) for row in rows)
    return [Question(row["prompt"], row["answer"], "", ids) for row, ids in zip(rows, encoded, strict=True)]


def groups_of(policy: Policy, count: int, completions: int = 8) -> list[Group]:
    """Groups of several lengths; every third has equal rewards."""
    sampled = policy.sample(questions(policy, count), completions)
    return [
        replace(group, rewards=[float((n + k) % 3 == 0 and n % 3 > 0) for k in range(completions)])
        for n, group in enumerate(sampled)
    ]
