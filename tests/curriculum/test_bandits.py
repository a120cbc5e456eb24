"""Strategies that choose by the rewards of training so far."""

import dataclasses

import numpy as np
from tests.curriculum.pool import chosen, pool

from cropi.curriculum.strategies.mopps import MoppsStrategy, posterior
from cropi.reward_statistics import Visit

MOPPS = MoppsStrategy(type="mopps")


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


def test_it_does_not_pay_for_stored_trajectories() -> None:
    assert not MOPPS.collects
    candidates = pool([0.5] * 26, visits=[seen(0, "a", 1.0, 8)])
    unlike = [
        dataclasses.replace(candidates, pass_rates_N=rates_N, variances_N=rates_N)
        for rates_N in (np.zeros(26), np.ones(26))
    ]
    assert chosen(MOPPS, 5, unlike[0]) == chosen(MOPPS, 5, unlike[1])
