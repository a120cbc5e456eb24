"""Sample and judge fresh trajectories from the current policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cropi.gradients.groups import Group
from cropi.policy import Policy
from cropi.rewards.verdicts import Judge, answered
from cropi.rollouts.generation import Sampling, TransformersGenerator
from cropi.seeds import derived_seed


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt and its row of the prompt table."""

    prompt_id: str
    prompt_ids: list[int]
    row: Mapping[str, Any]  # of the prompt table


def sample_groups(
    policy: Policy,
    prompts: Sequence[Prompt],
    count: int,
    sampling: Sampling,
    judge: Judge,
    *,
    batch_size: int,
    seed: int,
    label: str,
) -> list[Group]:
    """Sample and judge `count` completions of each prompt. They are on-policy: all importance ratios are 1.

    Prompts whose gold answer cannot be read are left out.
    """
    generate = TransformersGenerator(policy, batch_size)
    repeated = [prompt.prompt_ids for prompt in prompts for _ in range(count)]
    completions = generate(repeated, sampling, seed=derived_seed(seed, "audit", label))
    texts = policy.tokenizer.batch_decode(completions, skip_special_tokens=True)
    rows = [prompt.row for prompt in prompts for _ in range(count)]
    judged = judge([answered(text, row) for text, row in zip(texts, rows, strict=True)])
    groups = []
    for number, prompt in enumerate(prompts):
        part = slice(number * count, (number + 1) * count)
        rewards = [judgement.reward for judgement in judged[part]]
        known = [value for value in rewards if value is not None]
        if len(known) == count:
            groups.append(Group(prompt.prompt_id, prompt.prompt_ids, completions[part], known, None))
    return groups


def as_prompts(groups: Sequence[Group], rows: Mapping[str, Mapping[str, Any]]) -> list[Prompt]:
    """The prompts of stored groups, with their rows of the prompt table."""
    return [Prompt(group.prompt_id, group.prompt_ids, rows[group.prompt_id]) for group in groups]
