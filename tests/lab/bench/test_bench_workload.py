import pytest

from cropi.lab.bench.workload import builtin_workload, random_workload, tokens_given


def test_realistic_rows_are_what_they_are_said_to_be() -> None:
    work = random_workload("realistic", prompts=40, validation=6, vocabulary=500, seed=0)
    assert [group.has_signal for group in work.train].count(False) == 18
    assert all(group.has_signal for group in work.validation)
    for group in work.train + work.validation:
        assert 64 <= len(group.prompt_ids) <= 150
        assert len(group.completions) == len(group.weights) == 8
        assert all(100 <= len(ids) <= 250 for ids in group.completions)
        assert all(0 <= i < 500 for ids in [group.prompt_ids, *group.completions] for i in ids)
        advantages = [w * 8 * len(ids) for w, ids in zip(group.weights, group.completions, strict=True)]
        assert sum(advantages) == pytest.approx(0, abs=1e-9)
    facts = work.facts()
    assert facts["zero_share"] == pytest.approx(0.45)
    assert facts["trajectories"] == 320
    assert facts["tokens_given_train"] == tokens_given(work.train)
    assert facts["mean_completion_tokens"] == pytest.approx(175, abs=10)


@pytest.mark.parametrize("name", ["realistic", "plain"])
def test_the_seed_decides_the_rows(name: str) -> None:
    first, again, other = (
        random_workload(name, prompts=5, validation=2, vocabulary=100, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_builtin_rows_are_real_and_mixed() -> None:
    work = builtin_workload(prompts=12, validation=4, threads=1, seed=0)
    assert len({group.prompt_id for group in work.train}) == 12
    assert len(work.validation) == 4
    assert all(len(set(group.weights)) > 1 for group in work.train + work.validation)
    assert max(len(ids) for group in work.train for ids in group.completions) <= 32
