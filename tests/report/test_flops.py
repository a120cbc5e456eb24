"""Operations of a run by hand."""

import pytest

from cropi.config.loading import load_config
from cropi.report.costs import flops, score_multiple

COLLECTED = {"tokens": 30, "prompt_tokens": 10, "passes": 2}
GENERATED = COLLECTED | {"passes": 1}
SCORED = {"tokens": 100, "computed_tokens": 50, "validation_tokens": 7}
BATCH = {"tokens": 16, "prompt_tokens": 4}
QUICKSTART = ["trainer.beta=0.0"]


def test_operations_by_phase():
    config = load_config("quickstart", [*QUICKSTART, "select.strategy=influence"])
    found = flops(config, 1000, [COLLECTED, GENERATED], [SCORED], [BATCH])
    # A forward pass of a token is 2 x 1000 operations.
    assert found.collect == 2000 * (2 * 40 + 40)
    assert found.score == 2000 * (2 * 50 + 3 * 7)
    assert found.train == 2000 * (1 + 3) * 20
    assert found.total == found.collect + found.score + found.train


@pytest.mark.parametrize(
    ("overrides", "passes"), [(["trainer.num_iterations=2"], 7), (["trainer.beta=0.04"], 5), ([], 4)]
)
def test_passes_over_a_batch(overrides: list[str], passes: int):
    found = flops(load_config("quickstart", [*QUICKSTART, *overrides]), 1, [], [], [BATCH])
    assert found.train == 2 * passes * 20


@pytest.mark.parametrize(
    ("overrides", "multiple"),
    [
        ([], 2),
        (["score.estimator=exact"], 4),  # the quickstart has two validation sets
        (["score.estimator=reference"], 3),
        (["score.mask=uniform"], 3),
    ],
)
def test_what_a_token_of_the_pool_costs(overrides: list[str], multiple: int):
    config = load_config("quickstart", ["select.strategy=influence", *overrides])
    assert score_multiple(config.score, len(config.prompts.validation)) == multiple


def test_a_scoring_by_autograd_costs_what_autograd_costs():
    config = load_config("quickstart", ["select.strategy=influence"])
    assert flops(config, 1, [], [SCORED | {"estimator": "reference"}], []).score == 2 * (3 * 50 + 3 * 7)


def test_validation_gradients_that_are_scaled_are_made_twice():
    config = load_config("quickstart", ["select.strategy=learnalign"])
    assert flops(config, 1, [], [SCORED], []).score == 2 * (2 * 50 + 6 * 7)


def test_sketched_directions_need_no_weight_gradients():
    """And what the products of sketching are worth is counted by itself."""
    own = [{"computed_tokens": 0, "validation_tokens": 7, "read_passes": 1.5}]
    assert flops(load_config("quickstart"), 1, [], own, []).score == 2 * (2 * 7 + 1.5)


def test_work_that_was_interrupted_counts_for_nothing():
    config = load_config("quickstart")
    assert flops(config, 1, [{"seconds": 1.0}], [{"seconds": 2.0}], []).total == 0


def test_tokens_that_are_only_read_cost_a_forward_pass():
    assert flops(load_config("quickstart"), 10, [], [{"forward_tokens": 8}], []).score == 20 * 8


def test_low_rank_products_are_charged_where_they_are_made():
    found = flops(load_config("quickstart"), 10, [], [{"read_passes": 1.5}], [], [{"read_passes": 2.0}, {"step": 1}])
    assert (found.score, found.train) == (20 * 1.5, 20 * 2.0)


def test_of_refilled_batches_all_is_generated_and_a_batch_trained():
    config = load_config("quickstart", [*QUICKSTART, "select.strategy=full", "train.dynamic_sampling=2"])
    batches = [
        {"step": 0, "prompt_ids": ["p"] * 8, "tokens": 60, "prompt_tokens": 20},
        {"step": 0, "prompt_ids": ["q"] * 2, "tokens": 15, "prompt_tokens": 5},
        {"step": 1, "prompt_ids": ["p"] * 8, "tokens": 60, "prompt_tokens": 20},
    ]
    assert flops(config, 1, [], [], batches).train == 2 * (180 + 3 * (100 * 8 / 10 + 80))
