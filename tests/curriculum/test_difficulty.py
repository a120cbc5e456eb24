"""Strategies that choose by the stored pass rate."""

import dataclasses
import math

import numpy as np
import pytest
from tests.curriculum.pool import chosen, pool, scores

from cropi.curriculum.strategies import (
    DotsStrategy,
    GaussianStrategy,
    LearnabilityStrategy,
    MidStrategy,
    PassRateStrategy,
    VcrlStrategy,
)
from cropi.curriculum.strategies.vcrl import normalised_variance
from cropi.errors import SignalError

MID, VCRL, DOTS = MidStrategy(type="mid"), VcrlStrategy(type="vcrl"), DotsStrategy(type="dots")
GAUSSIAN, FILES = GaussianStrategy(type="gaussian"), "cropi.curriculum.strategies"


def test_mid_by_hand() -> None:
    # distances from 1/2: a 3/8, b 1/8, c 1/2, d 1/4; e has no reward
    candidates = pool([1 / 8, 5 / 8, 1.0, 3 / 4, math.nan])
    assert scores(MID, candidates)[:4].tolist() == [1 / 8, 3 / 8, 0, 1 / 4]
    assert chosen(MID, 5, candidates) == ["b", "d", "a", "c"]  # those of equal rewards last, e never


@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_normalised_variance_is_the_sample_variance_over_its_largest(size: int) -> None:
    rewards = [[1.0] * c + [0.0] * (size - c) for c in range(size + 1)]
    variances_N = np.var(rewards, axis=1, ddof=1)
    found_N = normalised_variance(np.var(rewards, axis=1), np.full(size + 1, size))
    np.testing.assert_allclose(found_N, variances_N / variances_N.max())
    # VCRL's own forms of the largest: G / (4 (G - 1)) for an even group, (G + 1) / (4 G) for an odd one
    most = size / (4 * (size - 1)) if size % 2 == 0 else (size + 1) / (4 * size)
    assert variances_N.max() == pytest.approx(most)


def test_vcrl_keeps_what_varies_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    # of K = 8: 1 right 7/16, 2 right 12/16, 3 right 15/16, 4 right 1
    candidates = pool([1 / 8, 1 / 4, 3 / 8, 1 / 2, 1.0, math.nan])
    assert sorted(chosen(VCRL, 6, candidates)) == ["c", "d"]
    with pytest.raises(SignalError, match="none of the 2 prompts qualifies"):
        chosen(VCRL, 2, pool([1 / 8, 1.0]))
    monkeypatch.setattr(f"{FILES}.vcrl.KAPPA", 0.75)
    assert sorted(chosen(VCRL, 6, candidates)) == ["b", "c", "d"]  # the bound itself
    monkeypatch.setattr(f"{FILES}.vcrl.KAPPA", 0.0)
    assert sorted(chosen(VCRL, 6, candidates)) == ["a", "b", "c", "d"]


def test_prompts_graded_all_alike_are_not_taken_for_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three that always earn 1/2 beside three that vary around 0.3."""
    grades = {"pass_rates_N": np.array([0.5] * 3 + [0.3] * 3), "variances_N": np.array([0.0] * 3 + [0.04] * 3)}
    monkeypatch.setattr(f"{FILES}.vcrl.KAPPA", 0.1)
    statuses = ["no_signal"] * 3 + ["ok"] * 3
    candidates = dataclasses.replace(pool([0.5] * 6), statuses=statuses, **grades)
    for strategy in (
        MID,
        DOTS,
        GAUSSIAN,
        PassRateStrategy(type="pass_rate", low=0.2, high=0.6),
        LearnabilityStrategy(type="learnability"),
        VCRL,
    ):
        assert set(chosen(strategy, 3, candidates)) == {"d", "e", "f"}, strategy.type
    assert chosen(MID, 6, candidates)[3:] == ["a", "b", "c"]  # fills up, as with verdicts


def test_a_group_of_its_own_size_has_its_own_largest_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = pool([1 / 3, 1 / 3], group_sizes_N=np.array([3, 6]))
    monkeypatch.setattr(f"{FILES}.vcrl.KAPPA", 0.9)
    assert chosen(VCRL, 2, candidates) == ["a"]  # 2/2 and 8/9


def test_dots_takes_the_nearest_and_draws_among_equals() -> None:
    candidates = pool([0.5] * 6 + [0.375] * 6 + [1.0, math.nan])
    seeds = [set(chosen(DOTS, 3, dataclasses.replace(candidates, seed=seed))) for seed in range(30)]
    assert set().union(*seeds) == set("abcdef")
    assert len({frozenset(ids) for ids in seeds}) > 5
    assert set(chosen(DOTS, 12, candidates)) == set("abcdefghijkl")


def test_dots_draws_without_replacement_by_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three prompts: the probability of each pair, drawn one after the other in proportion to the weights."""
    monkeypatch.setattr(f"{FILES}.dots.TEMPERATURE", 0.25)
    candidates = pool([0.5, 0.25, 0.0])
    weights = {"a": 1.0, "b": math.exp(-1), "c": math.exp(-2)}
    total, draws = sum(weights.values()), 4000
    counts = dict.fromkeys(("ab", "ac", "bc"), 0)
    for seed in range(draws):
        counts["".join(sorted(chosen(DOTS, 2, dataclasses.replace(candidates, seed=seed))))] += 1
    for pair, count in counts.items():
        one, two = (weights[i] for i in pair)
        chance = one / total * two / (total - one) + two / total * one / (total - two)
        assert abs(count - draws * chance) < 4 * (draws * chance * (1 - chance)) ** 0.5


def curve(monkeypatch: pytest.MonkeyPatch, first: float, last: float, sigma: float) -> None:
    for name, value in {"FIRST": first, "LAST": last, "SIGMA": sigma}.items():
        monkeypatch.setattr(f"{FILES}.gaussian.{name}", value)


def test_the_gaussian_moves_from_easy_to_hard(monkeypatch: pytest.MonkeyPatch) -> None:
    curve(monkeypatch, 0.875, 0.125, 0.05)
    rates = [p for p in (0.125, 0.5, 0.875) for _ in range(20)]
    found = [set(chosen(GAUSSIAN, 20, pool(rates, stage=stage, stages=3))) for stage in range(3)]
    ids = pool(rates).prompt_ids
    assert found == [set(ids[40:]), set(ids[20:40]), set(ids[:20])]
    assert set(chosen(GAUSSIAN, 20, pool(rates))) == set(ids[40:])  # a run of one stage stays at its beginning


def test_gaussian_weights_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The better of two prompts comes first with w_a / (w_a + w_b), w = exp(-(p - mu)^2 / (2 sigma^2))."""
    curve(monkeypatch, 0.5, 0.2, 0.25)
    candidates, draws = pool([0.5, 0.875]), 4000
    first = sum(chosen(GAUSSIAN, 1, dataclasses.replace(candidates, seed=seed)) == ["a"] for seed in range(draws))
    chance = 1 / (1 + math.exp(-(0.375**2) / (2 * 0.25**2)))
    assert abs(first - draws * chance) < 4 * (draws * chance * (1 - chance)) ** 0.5
