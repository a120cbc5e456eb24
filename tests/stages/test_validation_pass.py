"""Validation prompts are sampled by all processes together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.distributed.threads import together

from cropi.config import PolicyConfig
from cropi.gradients.groups import SurrogateSettings
from cropi.parallel import ProcessGroup
from cropi.policy import completion_logprobs, load_policy
from cropi.rollouts.generation import Sampling
from cropi.stages.validation_pass import Answer, Member, SampledGroup, SetDirection, ValidationPass, grouped

DUE = {"one": [2, 2, 0], "two": [2, 3]}


def test_processes_divide_the_prompts_and_all_get_all_groups() -> None:
    asked: dict[int, list[Any]] = {}

    def sampled(ranks: ProcessGroup) -> dict[str, list[SampledGroup]]:
        seeds = []

        def ask(members: Sequence[Member], seed: int) -> list[Answer]:
            seeds.append(seed)
            asked[ranks.rank] = list(members)
            return [Answer((len(name), n), [k], [1], float(k % 2)) for k, (name, n) in enumerate(members)]

        validation = ValidationPass({}, Sampling(4, 1.0), SurrogateSettings(), 10, lambda *at: hash(at))
        groups = validation.sample(ask, DUE, 7)
        assert seeds == [hash((7, 1)) if ranks.rank else hash((7,))]
        return groups

    first, second = together(sampled)
    assert first == second
    assert {name: [(g.member, len(g.rewards)) for g in groups] for name, groups in first.items()} == {
        "one": [(0, 2), (1, 2)],
        "two": [(0, 2), (1, 3)],
    }
    wanted = [("one", 0)] * 2 + [("one", 1)] * 2 + [("two", 0)] * 2 + [("two", 1)] * 3
    assert sorted(asked[0] + asked[1]) == wanted
    assert asked[0]
    assert asked[1]


def test_what_only_some_prompts_begin_with_counts_as_written_by_a_tool() -> None:
    answers = [Answer([1, 2, 3], [8, 9], [1, 0], 1.0), Answer([1, 2, 4, 5], [8], [1], 0.0)]
    group = SampledGroup.of(4, answers)
    assert (group.member, group.tokens, group.rewards) == (4, [1, 2], [1.0, 0.0])
    assert group.completions == [[3, 8, 9], [4, 5, 8]]
    assert group.masks == [[0, 1, 0], [0, 0, 1]]


def test_answers_without_a_reward_are_left_out() -> None:
    answers = [Answer([1], [2], [1], reward) for reward in (None, 1.0, None)]
    found = grouped([("two", 0), ("one", 3), ("one", 3)], answers)
    assert found == {("one", 3): [answers[1]]}


def test_what_a_tool_wrote_has_no_weight_in_the_direction() -> None:
    policy = load_policy(PolicyConfig(path="builtin", cpu_threads=1))
    prompt, completions = [5, 6], [[7, 8, 9], [7, 10]]
    group = SampledGroup(0, prompt, completions, [1.0, 0.0], masks=[[1, 0, 1], [1, 1]])
    settings = SurrogateSettings(normalizer="sequence")
    made = ValidationPass({}, Sampling(8, 1.0), settings, 100, lambda *_: 0)
    loss = made._loss(policy.model, list(made._rows(group)))
    logprobs, _ = completion_logprobs(policy.model, [prompt] * 2, completions, temperature=1.0)
    advantage = 0.5 / (0.5**0.5 + 1e-4)
    expected = -advantage / 2 * ((logprobs[0, 0] + logprobs[0, 2]) / 2 - (logprobs[1, 0] + logprobs[1, 1]) / 2)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_pass_takes_no_more_than_a_quarter_of_the_free_memory_for_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(PolicyConfig(path="builtin"))
    group = SampledGroup(0, [5, 6], [[7, 8]] * 8, [1.0, 0.0] * 4)
    made = ValidationPass({}, Sampling(8, 1.0), SurrogateSettings(), 8192, lambda *_: 0)

    def rows_at_once(tokens: int) -> list[int]:
        of_a_token = 4 * 4 * policy.model.config.vocab_size
        monkeypatch.setattr("cropi.stages.validation_pass.free_bytes", lambda _: 4 * tokens * of_a_token)
        return [len(rows) for rows in made._micro_batches(policy.model, [group])]

    assert rows_at_once(8192) == [8]
    assert rows_at_once(12) == [3, 3, 2]
    assert rows_at_once(1) == [1] * 8


@pytest.mark.parametrize(("cosine", "norm"), [(0.81, 0.9), (0.01, 0.1**0.5), (-0.5, 0.1**0.5)])
def test_slopes_stay_of_one_size_where_the_halves_of_a_direction_hardly_agree(cosine: float, norm: float) -> None:
    halves = [{"v": torch.tensor([1.0, 0.0])}, {"v": torch.tensor([cosine, (1 - cosine**2) ** 0.5])}]
    found = SetDirection.of(halves)
    assert found is not None
    assert found.norm == pytest.approx(norm)
