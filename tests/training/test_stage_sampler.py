from collections import Counter

from trl.trainer.utils import RepeatSampler

from cropi.training.stage_sampler import BatchShape, StageSampler

SHAPE = BatchShape(prompts=3, generations=2, repeats=2)


def prompts_of(indices: list[int], shape: BatchShape = SHAPE) -> list[int]:
    """One entry per prompt of a generation batch, in order."""
    size = shape.prompts * shape.generations * shape.repeats
    chunks = [indices[start : start + size] for start in range(0, len(indices), size)]
    return [position for chunk in chunks for position in chunk[: shape.prompts * shape.generations : shape.generations]]


def test_layout_is_that_of_trl() -> None:
    sampler = StageSampler(SHAPE, chunks_per_stage=2, seed=0)
    sampler.start_stage(0, range(6), 0)
    ours = list(sampler)
    theirs = list(RepeatSampler(range(6), mini_repeat_count=2, batch_size=3, repeat_count=2, shuffle=False))
    order = prompts_of(ours)
    assert sorted(order) == list(range(6))
    assert ours == [order[position] for position in theirs]
    assert len(sampler) == len(ours)


def test_only_the_selection_and_exactly_the_length() -> None:
    sampler = StageSampler(SHAPE, chunks_per_stage=5, seed=0)
    for stage, selection in enumerate([[4, 8], [1], list(range(50, 90))]):
        sampler.start_stage(stage, selection, stage)
        indices = list(sampler)
        assert set(indices) <= set(selection)
        assert len(indices) == len(sampler) == 5 * 3 * 2 * 2


def test_a_small_selection_is_repeated_evenly_and_reshuffled() -> None:
    sampler = StageSampler(SHAPE, chunks_per_stage=8, seed=1)
    sampler.start_stage(0, [10, 11, 12, 13], 0)
    order = prompts_of(list(sampler))
    assert Counter(order) == {10: 6, 11: 6, 12: 6, 13: 6}
    passes = [tuple(order[start : start + 4]) for start in range(0, 24, 4)]
    assert len(set(passes)) > 1


def test_the_full_pool_is_walked_through_before_any_repeat() -> None:
    sampler = StageSampler(SHAPE, chunks_per_stage=2, seed=0)
    order = []
    for stage in range(3):
        sampler.start_stage(stage, range(20), 0)
        order += prompts_of(list(sampler))
    assert len(set(order)) == 18
