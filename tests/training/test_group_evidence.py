"""Influence of a batch's rows, summed over groups; groups that are not whole have none."""

import numpy as np
import torch
from tests.distributed.threads import together

from cropi.parallel import ProcessGroup
from cropi.training.group_evidence import GroupEvidence, GroupOutcome, LossRow
from cropi.training.reward_log import Judged

TOKENS = {"a": (1,), "b": (2,)}


def judged(rewards: list[float | None], completions: list[list[int]]) -> Judged:
    return Judged(["a", "a", "b", "b"], completions, rewards, ["correct"] * 4)


def read(evidence: GroupEvidence, rows: list[tuple[str, tuple[int, ...]]]) -> None:
    """Row n has influence (n + 1, 10 (n + 1)) on one set."""
    values = torch.tensor([[[n + 1.0, 10 * (n + 1.0)]] for n in range(len(rows))])
    evidence.add([LossRow(TOKENS[prompt], completion, False) for prompt, completion in rows], values)


def test_missing_rewards_and_lost_rows_give_no_influence() -> None:
    evidence = GroupEvidence(TOKENS, 2, 0)
    read(evidence, [("b", (6,)), ("a", (5,)), ("b", (9,)), ("a", (6,))])
    first, second = evidence.finish(judged([1.0, 1.0, 0.0, 1.0], [[5], [6], [5], [6]]))
    assert first.influence_VCH is not None
    assert first.rewards == [1.0, 1.0]
    assert second.influence_VCH is None
    assert evidence.dropped == 1
    read(evidence, [("b", (6,)), ("a", (5,)), ("b", (5,)), ("a", (6,))])
    first, _ = evidence.finish(judged([1.0, None, 0.0, 1.0], [[5], [6], [5], [6]]))
    assert first.influence_VCH is None
    assert first.rewards == [1.0]


def test_scaling_by_the_batch_is_undone() -> None:
    evidence = GroupEvidence(TOKENS, 2, 0, batch_scaled=True)
    read(evidence, [("a", (5,)), ("a", (6,)), ("b", (5,)), ("b", (6,))])
    first, _ = evidence.finish(judged([1.0, 0.0, 0.0, 1.0], [[5], [6], [5], [6]]))
    assert np.allclose(first.influence_VCH.sum(1), (np.std([1, 0, 0, 1], ddof=1) + 1e-4) * np.array([[3.0, 30.0]]))


def test_groups_that_lie_on_two_processes_are_put_together_alike() -> None:
    """Three groups of two; each process has three rows."""
    completions, rewards = [[5], [6], [7], [8], [5], [6]], [1.0, 0.0, 0.5, 0.0, 0.0, 1.0]
    prompts, order = ["a", "a", "c", "c", "b", "b"], [2, 0, 1]

    def finished(ranks: ProcessGroup) -> list[GroupOutcome]:
        evidence = GroupEvidence(TOKENS | {"c": (3,)}, 2, 0)
        rows = [3 * ranks.rank + place for place in order] if ranks.size > 1 else [5, 3, 1, 0, 2, 4]
        values = torch.tensor([[[row + 1.0, 10 * (row + 1.0)]] for row in rows])
        tokens = evidence.prompt_tokens
        evidence.add([LossRow(tokens[prompts[row]], tuple(completions[row]), False) for row in rows], values)
        own = slice(3 * ranks.rank, 3 * ranks.rank + 3) if ranks.size > 1 else slice(6)
        part = prompts[own], completions[own], rewards[own], ["correct"] * len(prompts[own])
        return evidence.finish(Judged(*part))

    def plain(outcomes: list[GroupOutcome]) -> list[object]:
        assert all(outcome.influence_VCH is not None for outcome in outcomes)
        return [(o.number, o.prompt_id, o.rewards, np.array(o.influence_VCH).tolist()) for o in outcomes]

    first, second = together(finished)
    assert plain(first) == plain(second) == plain(finished(ProcessGroup()))
