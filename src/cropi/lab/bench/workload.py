"""The workload of a benchmark: the same train and validation prompts for every contender.

A prompt's gradient is the sum over its trajectories
of weight_k = A_k / Z_k times grad log pi(completion_k), at the very policy that is measured (all ratios are 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cropi.errors import DataError
from cropi.gradients.groups import Group, SurrogateSettings, trajectory_scales
from cropi.lab.bench.contender_task import WeightedGroup
from cropi.seeds import derived_seed

ZERO_SHARE = 0.45
TRAJECTORIES = 8
PROMPT_TOKENS = {"realistic": (64, 150), "plain": (8, 32)}
COMPLETION_TOKENS = (100, 250)

GRPO = SurrogateSettings(normalizer="sequence", max_completion_length=COMPLETION_TOKENS[1])
"""A_k as in GRPO, Z_k = K |tau_k|."""


@dataclass(frozen=True)
class Workload:
    """Train and validation prompts."""

    train: list[WeightedGroup]
    validation: list[WeightedGroup]

    def facts(self) -> dict[str, Any]:
        """Counts of the workload; each trajectory counts with its own copy of the prompt."""
        trajectories = [(group, ids) for group in self.train for ids in group.completions]
        return {
            "prompts": len(self.train),
            "validation_prompts": len(self.validation),
            "trajectories": len(trajectories),
            "zero_share": 1 - sum(group.has_signal for group in self.train) / len(self.train),
            "mean_prompt_tokens": float(np.mean([len(group.prompt_ids) for group, _ in trajectories])),
            "mean_completion_tokens": float(np.mean([len(ids) for _, ids in trajectories])),
            "tokens_given_train": tokens_given(self.train),
            "tokens_given_validation": tokens_given(self.validation),
        }


def tokens_given(groups: Sequence[WeightedGroup]) -> int:
    """Tokens of all trajectories, each with its prompt."""
    return sum(len(group.prompt_ids) + len(ids) for group in groups for ids in group.completions)


def random_workload(name: str, *, prompts: int, validation: int, vocabulary: int, seed: int) -> Workload:
    """`realistic` or `plain`. Exactly round(0.45 N) train prompts of `realistic` have equal rewards; validation prompts
    never have, for the score leaves those out anyway. The same arguments give the same rows in any process."""
    generator = np.random.default_rng(derived_seed(seed, "bench", name))
    zeros = (
        set(generator.permutation(prompts)[: round(ZERO_SHARE * prompts)].tolist()) if name == "realistic" else set()
    )

    def draw(label: str, row: int, *, signal: bool) -> WeightedGroup:
        prompt_ids = _ids(generator, int(generator.integers(*PROMPT_TOKENS[name], endpoint=True)), vocabulary)
        count = TRAJECTORIES if name == "realistic" else 1
        lengths = generator.integers(*COMPLETION_TOKENS, size=count, endpoint=True)
        completions = [_ids(generator, int(length), vocabulary) for length in lengths]
        prompt_id = f"{label}-{row:06}"
        if name == "plain":  # a group of one has no advantage, so it is given one
            return WeightedGroup(prompt_id, prompt_ids, completions, [float(generator.choice([-1, 1]) / lengths[0])])
        correct = int(generator.integers(1, count)) if signal else int(generator.choice([0, count]))
        rewards = generator.permutation([1.0] * correct + [0.0] * (count - correct)).tolist()
        return weighted(Group(prompt_id, prompt_ids, completions, rewards, None))

    return Workload(
        [draw("train", row, signal=row not in zeros) for row in range(prompts)],
        [draw("validation", row, signal=True) for row in range(validation)],
    )


def _ids(generator: np.random.Generator, count: int, vocabulary: int) -> list[int]:
    """Random token ids with the frequencies of words: p(id) falls like 1 / id (Zipf)."""
    return (np.floor((vocabulary + 1) ** generator.random(count)) - 1).astype(int).clip(0, vocabulary - 1).tolist()


def weighted(group: Group) -> WeightedGroup:
    """Give a group the weights of our own surrogate."""
    return WeightedGroup(group.prompt_id, group.prompt_ids, group.completions, trajectory_scales(group, GRPO))


def builtin_workload(*, prompts: int, validation: int, threads: int, seed: int) -> Workload:
    """Mixed groups of the built-in policy: `prompts` over all of its families, `validation` over the two that the
    quickstart aims at, one after the other in turn."""
    from cropi.builtin import FAMILIES

    torch.set_num_threads(threads)
    targets = ("sum", "machine")
    halves = [
        list(mixed_groups([family], "validation", (validation + 1 - half) // 2, seed))
        for half, family in enumerate(targets)
    ]
    return Workload(
        [weighted(group) for group in mixed_groups(sorted(FAMILIES), "train", prompts, seed)],
        [weighted(halves[row % 2][row // 2]) for row in range(validation)],
    )


def mixed_groups(families: Sequence[str], split: str, count: int, seed: int) -> Iterator[Group]:
    """The first `count` groups whose rewards differ; families take turns."""
    from cropi.builtin import generate
    from cropi.config import PolicyConfig
    from cropi.policy import load_policy
    from cropi.prompts.encoding import encode_prompts
    from cropi.rewards.verifier import Answered, reward
    from cropi.rewards.verifiers.exact_text import ExactVerifier
    from cropi.rollouts.generation import Sampling, TransformersGenerator

    policy = load_policy(PolicyConfig(path="builtin"))
    complete, verify = TransformersGenerator(policy, 512), ExactVerifier(type="exact", marker="answer").load()
    found, size = 0, max(4, count * 3 // (2 * len(families)))  # some groups will not be mixed
    try:
        rows = [generate(family, split=split, count=size, seed=derived_seed(seed, family)) for family in families]
    except ValueError as error:
        raise DataError(str(error), where="--prompts or --validation", fix="ask for fewer.") from None
    turns = [row for together in zip(*rows, strict=True) for row in together]
    for start in range(0, len(turns), 64):
        part = turns[start : start + 64]
        prompts = encode_prompts(policy.tokenizer, [row["prompt"] for row in part])
        repeated = [ids for ids in prompts for _ in range(TRAJECTORIES)]
        completions = complete(repeated, Sampling(32, 1.0), seed=derived_seed(seed, split, start))
        texts = policy.tokenizer.batch_decode(completions, skip_special_tokens=True)
        for n, row in enumerate(part):
            mine = slice(n * TRAJECTORIES, (n + 1) * TRAJECTORIES)
            rewards = [reward(verify(Answered(text, row["answer"]))) or 0.0 for text in texts[mine]]
            if len(set(rewards)) > 1:
                yield Group(row["prompt_id"], prompts[n], completions[mine], rewards, None)
                found += 1
                if found == count:
                    return
    raise DataError(f"only {found} of {count} groups are mixed", where=split, fix="ask for fewer prompts.")
