"""Strategies that choose by gradients, and the one that does by the text."""

import dataclasses
import math

import numpy as np
import pytest
from tests.curriculum.pool import chosen, pool, scores

from cropi.curriculum.strategies import GradientNormStrategy, InfluenceStrategy, LearnAlignStrategy, SimilarityStrategy
from cropi.curriculum.strategy import CANDIDATES, FusionConfig
from cropi.functional.influence_formulas import halves
from cropi.seeds import unit_interval

TOP = InfluenceStrategy(type="influence")
BOTTOM = InfluenceStrategy(type="influence", order="bottom")
SHUFFLED = InfluenceStrategy(type="influence", order="shuffled")
VALUES = {"u": np.array([0.9, 0.1, -0.5, 0.3, 0.0]), "v": np.array([-1.0, 0.4, 0.5, 0.3, 0.0])}
FIVE = pool([0.5, 0.5, 0.5, 0.5, 1.0], influence=VALUES)


def test_bottom_is_the_other_end_of_each_ranking() -> None:
    # by -u: c1 e2 b3 d4 a5, by -v: a1 e2 d3 b4 c5; with kappa 0: a 1/5 + 1, b 1/3 + 1/4, c 1 + 1/5, d 1/4 + 1/3
    assert chosen(BOTTOM, 2, FIVE, fusion=FusionConfig(kappa=0)) == ["a", "c"]
    single = dataclasses.replace(FIVE, influence={"u": VALUES["u"]})
    assert chosen(BOTTOM, 4, single) == chosen(TOP, 4, single)[::-1] == ["c", "b", "d", "a"]


def test_shuffled_hands_the_same_scores_round() -> None:
    plain, shuffled = scores(TOP, FIVE), scores(SHUFFLED, FIVE)
    assert sorted(plain[:4]) == pytest.approx(sorted(shuffled[:4]))  # both sets' values move together
    assert shuffled[4] == plain[4]  # what has no signal has no part in it
    single, counts = dataclasses.replace(FIVE, influence={"u": VALUES["u"]}), dict.fromkeys("abcd", 0)
    for seed in range(400):
        for stage in range(2):
            (best,) = chosen(SHUFFLED, 1, dataclasses.replace(single, seed=seed, stage=stage))
            counts[best] += 1
    assert all(abs(count - 200) < 4 * (800 * 0.25 * 0.75) ** 0.5 for count in counts.values())


def test_gradient_norm_takes_the_longest() -> None:
    candidates = pool([0.5, 0.5, 0.5, 1.0], lengths_N=np.array([1.0, 3.0, math.nan, 0.0]))
    assert chosen(GradientNormStrategy(type="gradient_norm"), 4, candidates) == ["b", "a"]


def test_learnalign_against_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores that the gradients themselves give, each prompt against the sampled ones of the other half."""
    monkeypatch.setattr(LearnAlignStrategy, "candidates_aimed_at", 6)
    rng = np.random.default_rng(0)
    gradients_NP = rng.normal(size=(12, 5))
    rates = [(1 + n % 7) / 8 for n in range(12)]
    candidates = pool(rates, seed=3)
    keys = {i: unit_interval(3, "candidates", i) for i in candidates.prompt_ids}
    sampled = halves(keys, 6)
    lengths_N = np.linalg.norm(gradients_NP, axis=1)
    row_of = {i: row for row, i in enumerate(candidates.prompt_ids)}
    directions = [np.mean([gradients_NP[row_of[i]] / lengths_N[row_of[i]] for i in half], axis=0) for half in sampled]
    products = {name: gradients_NP @ direction for name, direction in zip(CANDIDATES, directions, strict=True)}
    found_N = scores(
        LearnAlignStrategy(type="learnalign"), dataclasses.replace(candidates, influence=products, lengths_N=lengths_N)
    )

    def cosine(one: str, two: str) -> float:
        first, second = gradients_NP[row_of[one]], gradients_NP[row_of[two]]
        return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))

    for row, i in enumerate(candidates.prompt_ids):
        others = [half for half in sampled if i not in half] if any(i in half for half in sampled) else sampled
        mean = np.mean([cosine(i, j) for half in others for j in half])
        assert found_N[row] == pytest.approx(rates[row] * (1 - rates[row]) * mean)


TEXTS = [
    "add two and two",
    "the longest road home",
    "add three and five",
    "a road of two miles",
    "add two and two",
    "roads go home",
    "how long is a mile",
]
RATES = [0.5, 0.5, 0.125, 0.5, 1.0, 0.5, 0.5]
ALIKE = pool(RATES, texts=TEXTS, validation_texts={"sums": ["add one and two", "add six"]})


def test_similarity_takes_the_most_similar_text() -> None:
    plain = SimilarityStrategy(type="similarity")
    assert chosen(plain, 3, ALIKE) == ["a", "e", "c"]  # equal texts by id; e is always solved, and nobody looks
    assert not plain.collects


def test_similarity_and_learnability() -> None:
    both = SimilarityStrategy(type="similarity", learnability=True)
    assert both.collects
    assert not both.reads_scores
    assert chosen(both, 2, ALIKE) == ["a", "c"]  # e has no signal; c has little, but the others are not like them
    even = dataclasses.replace(ALIKE, variances_N=np.array([1 / 64, 0.25, 0.25, 0.25, 0.0, 0.25, 0.25]))
    assert chosen(both, 2, even) == ["c", "a"]
