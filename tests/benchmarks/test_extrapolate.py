"""The page on sizes that nobody has measured is what its command computes, and that follows from the parts."""

from dataclasses import replace

import costs_at_scale as costs
import extrapolate
import pytest
from costs_at_scale import Assumptions, Measured, break_even, ledger, operations, seconds, settings

USUAL = Assumptions()
SMALL, MIDDLE, LARGE = costs.MODELS


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Round numbers in place of the measured ones."""
    line = {100: 1e-3, 10_000: 0.1}
    seconds_of = {"influence": line, "pooled": {100: 1e-3, 1000: 0.02}}
    known = Measured({"structured": 1.5, "uniform": 2.0}, seconds_of, 1, store_s=2e-3, store_bytes=1)
    monkeypatch.setattr(costs, "measured", lambda: known)
    return known


def test_the_page_is_what_the_command_computes() -> None:
    text = extrapolate.PAGE.read_text(encoding="utf-8")
    assert extrapolate.written(text, extrapolate.page(USUAL)) == text, "run: python benchmarks/extrapolate.py --write"


def test_parameters_are_those_that_runs_are_charged_by() -> None:
    of_matrices, of_all = costs.parameters(SMALL)
    heads = 1536 * (1536 + 256 + 256) + 1536 * 1536
    layer = heads + 3 * 1536 * 8960
    assert of_matrices == 28 * layer + 1536 * 151936  # the tied head counts
    assert of_all == of_matrices + 28 * (1536 + 256 + 256 + 2 * 1536) + 1536
    assert costs.parameters(LARGE)[1] == 70_553_706_496  # as published


def test_lines_of_a_run_by_hand() -> None:
    a = replace(USUAL, prompt_tokens=10, completion_tokens=5, without_signal=0.5)
    lines = ledger(settings(SMALL, "all"), 1000, a)
    completions = 1000 * 8 + 2 * 100 * 32
    stored = {"passes": 1, "tokens": 5 * completions, "prompt_tokens": 10 * completions}
    assert (lines.generated, lines.read) == ([stored], [stored])
    scored = {"computed_tokens": 500 * (10 + 8 * 4), "validation_tokens": 200 * (10 + 32 * 4)}
    assert lines.scored == [scored] * 5
    assert lines.batch == {"passes": 1, "tokens": 5 * 1000 * 1024, "prompt_tokens": 10 * 1000 * 1024}
    done = operations(settings(SMALL, "all"), 7, 1000, a)
    assert done.collect == 2 * 7 * 2 * 15 * completions
    assert done.score_pool == 2 * 7 * 2 * 5 * scored["computed_tokens"]
    assert done.score_validation == 2 * 7 * 3 * 5 * scored["validation_tokens"]
    assert done.train == 2 * 7 * (1 + 4) * 15 * 1000 * 1024  # generation, forward, backward, the reference policy
    assert operations(settings(SMALL, "published"), 7, 1000, a).score_pool == 1.5 * done.score_pool


def test_the_preset_samples_less_and_scores_once() -> None:
    a = replace(USUAL, prompt_tokens=10, completion_tokens=5, without_signal=0.5)
    lines = ledger(settings(SMALL, "cropi"), 1000, a)
    sampled = 130 * 4 + 2 * 100 * 4
    screened = 5 * 100 * 4
    assert [line["tokens"] for line in lines.generated] == pytest.approx([5 * sampled, 5 * screened])
    assert lines.read == [{"passes": 1, "tokens": 0, "prompt_tokens": 10 * 1000}]
    assert len(lines.scored) == 1
    assert lines.scored[0]["computed_tokens"] == pytest.approx(65 * (2 * 10 + 4 * 4))


def test_seconds_are_split_over_gpus_but_for_selection_and_the_longest_completion(rates: Measured) -> None:
    few, many = (seconds(MIDDLE, "all", 1000, gpus, USUAL) for gpus in (8, 16))
    for name in ("collect", "score", "store"):
        assert getattr(few, name) == pytest.approx(2 * getattr(many, name))
    assert few.store == pytest.approx(3 * 1000 * 2e-3 / 8)
    assert few.select == many.select == pytest.approx(3 * 1e-2)
    without_end = seconds(MIDDLE, "all", 1000, 1e12, USUAL).train
    read = 2 * costs.parameters(MIDDLE)[1] / (3.35e12 * 0.6)
    assert without_end == pytest.approx(600 * 4096 * read, rel=1e-3)
    masks = {plan: seconds(MIDDLE, plan, 1e6, 8, USUAL).score for plan in ("all", "published")}
    assert masks["published"] / masks["all"] == pytest.approx(2.0 / 1.5, rel=0.02)  # not the 3 / 2 of the operations


@pytest.mark.parametrize("plan", costs.PLANS)
def test_at_the_limit_what_is_saved_is_what_it_costs(rates: Measured, plan: str) -> None:
    pool = break_even(MIDDLE, plan, 8, USUAL, 2.66)
    assert seconds(MIDDLE, plan, pool, 8, USUAL).whole_share == pytest.approx(1.66, rel=0.01)
    without = break_even(MIDDLE, plan, 8, USUAL, 2.66, selecting=False)
    assert without >= pool
    assert seconds(MIDDLE, plan, without, 8, USUAL).split_share == pytest.approx(1.66, rel=0.01)
    assert break_even(MIDDLE, plan, 8, USUAL, 1.0001) == 0  # less than the validation prompts cost
