"""Every contender of our own, in this process: what it computes, and that it agrees with what it should."""

from pathlib import Path

import numpy as np
import pytest

from cropi.gradients.engine import segment_of
from cropi.lab.bench.contender_task import Task, WeightedGroup
from cropi.lab.bench.contenders import BY_WEIGHT, as_group, contender, equal_rows
from cropi.lab.bench.policy_shapes import make_policy
from cropi.lab.bench.workload import Workload, random_workload


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    make_policy("tiny", folder, dtype="float32", device="cpu", seed=0)
    return folder


@pytest.fixture(scope="module")
def work() -> Workload:
    full = random_workload("realistic", prompts=6, validation=3, vocabulary=256, seed=0)
    return Workload([_shorter(group) for group in full.train], [_shorter(group) for group in full.validation])


def _shorter(group: WeightedGroup) -> WeightedGroup:
    completions = [ids[: 3 + k] for k, ids in enumerate(group.completions)]
    return WeightedGroup(group.prompt_id, group.prompt_ids[:9], completions, group.weights)


def task(policy: Path, work: Workload, name: str) -> Task:
    return Task(str(policy), work.train, work.validation, batch_tokens=512, contender=name)


def test_a_group_can_be_given_any_weights(work: Workload) -> None:
    for group in [*work.train, WeightedGroup("alone", [1], [[2, 3]], [0.7])]:
        segment = segment_of(0, as_group(group), BY_WEIGHT)
        if group.has_signal:
            assert segment.scales == pytest.approx(group.weights)
            assert segment.completions == group.completions
        else:
            assert segment is None


def test_scores_of_all_estimators_against_the_reference(policy: Path, work: Workload) -> None:
    scores = {}
    for name in ("reference", "exact", "exact-cosine", "sketch", "sketch-uniform"):
        engine = contender(task(policy, work, name))
        measured = engine.run()
        assert set(measured.parts) == {"train", "validation"}
        assert measured.seconds == pytest.approx(sum(part.seconds for part in measured.parts.values()))
        scores[name] = engine.scores_N()
    assert np.any(scores["reference"])
    for name in ("exact", "exact-cosine"):
        np.testing.assert_allclose(scores[name], scores["reference"], rtol=1e-3, atol=1e-9)
    for name in ("sketch", "sketch-uniform"):
        assert np.all(scores[name][scores["reference"] == 0] == 0)


def test_floors_compute_the_tokens_of_prompts_with_signal_once(policy: Path, work: Workload) -> None:
    tokens = sum(
        len(group.prompt_ids) + sum(len(ids) - 1 for ids in group.completions)
        for group in work.train
        if group.has_signal
    )
    for name in ("forward", "floor"):
        assert contender(task(policy, work, name)).run().tokens_computed == tokens
    length = equal_rows(task(policy, work, "stock")).shape[1]
    assert abs(contender(task(policy, work, "stock")).run().tokens_computed - tokens) <= length
