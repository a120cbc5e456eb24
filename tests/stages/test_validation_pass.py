"""Validation prompts are sampled by all processes together."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from tests.distributed.threads import together

from cropi.config import PolicyConfig
from cropi.gradients.groups import SurrogateSettings
from cropi.parallel import ProcessGroup
from cropi.policy import completion_logprobs, load_policy
from cropi.rollouts.generation import Sampling
from cropi.stages.validation_pass import SampledGroup, ValidationPass, ValidationPrompt

NAMES = ("one", "two")
DUE = {"one": [2, 2, 0], "two": [2, 3]}


def test_processes_divide_the_prompts_and_all_get_all_groups() -> None:
    asked: dict[int, list[Any]] = {}

    def sampled(ranks: ProcessGroup) -> dict[str, list[SampledGroup]]:
        seeds = []

        def generate(prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[list[int]]:
            seeds.append(seed)
            asked[ranks.rank] = [tuple(prompt) for prompt in prompts]
            return [[*prompt, n] for n, prompt in enumerate(prompts)]

        def judge(rows: Sequence[Any]) -> list[Any]:
            return [SimpleNamespace(reward=float(len(row.completion) % 2)) for row in rows]

        tokenizer = SimpleNamespace(batch_decode=lambda rows, **_: ["x" * row[-1] for row in rows])
        policy: Any = SimpleNamespace(tokenizer=tokenizer)
        row = {"answer": "", "source": "", "messages": "", "extra": ""}
        sets = {
            name: [ValidationPrompt(row, (n, place)) for place in range(len(DUE[name]))] for n, name in enumerate(NAMES)
        }
        sampling, own = Sampling(4, 1.0), SurrogateSettings()
        validation: Any = ValidationPass(sets, judge, sampling, own, 10, lambda *at: hash(at))
        groups = validation.sample(policy, generate, DUE, 7)
        assert seeds == [hash((7, 1)) if ranks.rank else hash((7,))]
        return groups

    first, second = together(sampled)
    assert first == second
    assert {name: [(g.member, len(g.rewards)) for g in groups] for name, groups in first.items()} == {
        "one": [(0, 2), (1, 2)],
        "two": [(0, 2), (1, 3)],
    }
    assert sorted(asked[0] + asked[1]) == sorted([(0, 0)] * 2 + [(0, 1)] * 2 + [(1, 0)] * 2 + [(1, 1)] * 3)
    assert asked[0]
    assert asked[1]


def test_what_a_tool_wrote_has_no_weight_in_the_direction() -> None:
    policy = load_policy(PolicyConfig(path="builtin", cpu_threads=1))
    prompt, completions = [5, 6], [[7, 8, 9], [7, 10]]
    group = SampledGroup(0, prompt, completions, [1.0, 0.0], masks=[[1, 0, 1], [1, 1]])
    settings = SurrogateSettings(normalizer="sequence")
    made = ValidationPass({}, lambda _: [], Sampling(8, 1.0), settings, 100, lambda *_: 0)
    loss = made._loss(policy.model, list(made._rows(group)))
    logprobs, _ = completion_logprobs(policy.model, [prompt] * 2, completions, temperature=1.0)
    advantage = 0.5 / (0.5**0.5 + 1e-4)
    expected = -advantage / 2 * ((logprobs[0, 0] + logprobs[0, 2]) / 2 - (logprobs[1, 0] + logprobs[1, 1]) / 2)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
