"""Strategies that choose by the rewards of training so far."""

import dataclasses

import numpy as np
import pytest
from tests.curriculum.pool import chosen, pool

from cropi.curriculum.strategies.greso import EASY, HARD, GresoStrategy, replay
from cropi.curriculum.strategies.mopps import MoppsStrategy, posterior
from cropi.curriculum.strategy import Candidates
from cropi.reward_statistics import Visit

MOPPS, GRESO = MoppsStrategy(type="mopps"), GresoStrategy(type="greso")


def seen(step: int, prompt_id: str, rate: float, tries: int) -> Visit:
    """A visit with verdicts for rewards."""
    return Visit(step, prompt_id, rate, tries, rate * (1 - rate))


def test_the_posterior_by_hand() -> None:
    visits = [seen(0, "a", 0.75, 8), seen(1, "a", 0.25, 4), seen(1, "b", 1.0, 1)]
    candidates = pool([0.5] * 3, visits=visits)
    a_N, b_N = posterior(candidates)
    # a: 1 + 6 + 1 and 1 + 2 + 3; b: one completion counts as one; c: never seen
    assert (a_N.tolist(), b_N.tolist()) == ([8, 2, 1], [6, 1, 1])


def test_mopps_takes_what_is_known_to_be_half_solved() -> None:
    rates = {"a": 0.5, "b": 0.0, "c": 1.0, "d": 0.5}
    visits = [seen(step, i, rate, 100) for step in range(20) for i, rate in rates.items()]
    candidates = pool([0.125, 0.5, 0.5, 0.0], visits=visits)
    assert set(chosen(MOPPS, 2, candidates)) == {"a", "d"}  # whatever the stored trajectories said


def test_mopps_begins_at_random_and_draws_anew() -> None:
    candidates = pool([0.5] * 5 + [float("nan")])
    counts = dict.fromkeys("abcde", 0)
    for seed in range(400):
        (one,) = chosen(MOPPS, 1, dataclasses.replace(candidates, seed=seed))
        counts[one] += 1
    assert all(abs(count - 80) < 4 * (400 * 0.2 * 0.8) ** 0.5 for count in counts.values())
    drawn = [chosen(MOPPS, 2, dataclasses.replace(candidates, stage=stage)) for stage in range(6)]
    assert drawn != [drawn[0]] * 6
    assert drawn[0] == chosen(MOPPS, 2, candidates)


def test_a_visit_changes_no_other_prompts_draw() -> None:
    def order(visits: list[Visit]) -> list[str]:
        return [i for i in chosen(MOPPS, 5, pool([0.5] * 5, visits=visits)) if i != "c"]

    assert order([]) == order([seen(0, "c", 1.0, 8)])


def visited(*batches: dict[str, float], steps_per_stage: int = 0) -> Candidates:
    visits = [seen(step, i, rate, 8) for step, batch in enumerate(batches) for i, rate in batch.items()]
    return pool([0.5] * 26, visits=visits, steps_per_stage=steps_per_stage, stage=1)


def test_streaks_of_equal_rewards_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cropi.curriculum.strategies.greso.CHANGE", 0)
    past = replay(
        visited(
            {"a": 1.0, "b": 0.0, "c": 1.0, "d": 1.0},
            {"a": 1.0, "b": 0.5, "c": 0.0, "d": 1.0},
            {"a": 1.0, "b": 0.0, "d": 0.5},
        )
    )
    assert past.streaks == {"a": (EASY, 3), "b": (HARD, 1), "c": (HARD, 1)}
    assert [past.chance(i) for i in "abcde"] == [0.125, 0.5, 0.5, 1, 1]
    monkeypatch.setattr("cropi.curriculum.strategies.greso.FLOOR", 0.2)
    assert past.chance("a") == 0.2


def test_graded_rewards_that_are_all_equal_are_a_streak() -> None:
    """No signal is none at 0.4 either; it counts as unsolved below 1/2."""
    visits = [Visit(0, "a", 0.4, 8, 0.0), Visit(0, "b", 0.5, 8, 0.0), Visit(0, "c", 0.4, 8, 0.01)]
    candidates = pool([0.5] * 3, visits=visits, steps_per_stage=0)
    assert replay(candidates).streaks == {"a": (HARD, 1), "b": (EASY, 1)}


def test_probabilities_follow_the_shares_of_each_step() -> None:
    # aims: 1/12 solved, 1/6 unsolved. Step 0: 1/4 solved, none unsolved; step 1: none solved, 1/2 unsolved
    batches = ({"a": 1.0, "b": 0.5, "c": 0.5, "d": 0.5}, {"a": 0.5, "b": 0.0})
    keep = replay(visited(*batches[:1])).keep
    assert keep == {EASY: pytest.approx(0.49), HARD: pytest.approx(0.51)}
    keep = replay(visited(*batches)).keep
    assert keep == {EASY: pytest.approx(0.50), HARD: pytest.approx(0.50)}
    assert replay(visited(*batches, steps_per_stage=1)).keep == {
        EASY: pytest.approx(0.51),
        HARD: pytest.approx(0.49),
    }  # not in the first stage, in which nothing can have been left out
    many = replay(visited(*[{"a": 1.0, "b": 0.5}] * 90))
    assert many.keep == {EASY: pytest.approx(0.05), HARD: pytest.approx(0.95)}  # their bounds


def test_all_batches_of_a_step_count_as_one() -> None:
    candidates = pool([0.5] * 4, visits=[seen(0, i, 0.5, 8) for i in "abcd"], steps_per_stage=0)
    assert replay(candidates).keep == {EASY: pytest.approx(0.51), HARD: pytest.approx(0.51)}


def test_greso_keeps_the_pool_at_first_and_then_drops_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = visited()
    assert chosen(GRESO, 26, candidates) == candidates.prompt_ids
    monkeypatch.setattr("cropi.curriculum.strategies.greso.CHANGE", 0)
    seen = visited({"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 1.0})
    kept = dict.fromkeys("abc", 0)
    for seed in range(2000):
        ids = chosen(GRESO, 26, dataclasses.replace(seen, seed=seed))
        for i in kept:
            kept[i] += i in ids
    assert kept["c"] == 2000
    for i, chance in (("a", 0.25), ("b", 0.5)):
        assert abs(kept[i] - 2000 * chance) < 4 * (2000 * chance * (1 - chance)) ** 0.5


def test_no_prompt_is_dropped_for_ever() -> None:
    past = visited(*[{"a": 0.0}] * 50)
    stages = (chosen(GRESO, 26, dataclasses.replace(past, stage=stage)) for stage in range(1000))
    assert 0 < sum("a" in ids for ids in stages) < 40  # the floor is 0.01


def test_neither_pays_for_stored_trajectories() -> None:
    assert not MOPPS.reads_trajectories
    assert not GRESO.reads_trajectories
    unlike = [
        dataclasses.replace(visited({"a": 1.0}), pass_rates_N=rates_N, variances_N=rates_N)
        for rates_N in (np.zeros(26), np.ones(26))
    ]
    assert chosen(GRESO, 26, unlike[0]) == chosen(GRESO, 26, unlike[1])
    assert chosen(MOPPS, 5, unlike[0]) == chosen(MOPPS, 5, unlike[1])
