"""Budgets against scores that are known: a scorer that looks contributions up, synthetic scores, and the real one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest
from tests.conftest import tiny_llama

from cropi.config import FusionConfig
from cropi.curriculum.strategies import InfluenceStrategy
from cropi.curriculum.strategy import Candidates
from cropi.gradients.budget import BudgetedScores, BudgetSettings, Cut, Rescoring, budgeted, subsample_factors
from cropi.gradients.groups import Group
from cropi.gradients.scorer import Scored, Scorer
from cropi.gradients.surrogate import SurrogateSettings

FULL = BudgetSettings(None, None, rescore=False, fraction=0.1)
CASCADE = BudgetSettings(2, 0.3, rescore=False, fraction=0.1)
AGAIN = BudgetSettings(None, None, rescore=True, fraction=0.1)


def group_of(prompt_id: str, rewards: Sequence[float], lengths: Sequence[int] | None = None) -> Group:
    lengths = lengths or [2] * len(rewards)
    return Group(prompt_id, [3, 4], [[5 + k % 3] * n for k, n in enumerate(lengths)], list(rewards), None)


class Table(Scorer):
    """Looks up what each trajectory contributes; a token costs a token."""

    def __init__(self, contributions: Mapping[str, np.ndarray]) -> None:
        self.estimator, self.score = "sketch", "dot"
        self.contributions = contributions
        self.calls: list[str] = []

    def __call__(
        self,
        groups: Sequence[Group],
        *,
        factors: Sequence[Sequence[float]] | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> Scored:
        sets = next(iter(self.contributions.values())).shape[1]
        weights = [[1.0] * len(g.completions) for g in groups] if factors is None else factors
        sums = [np.array(w) @ self.contributions[g.prompt_id] for g, w in zip(groups, weights, strict=True)]
        self.calls += [group.prompt_id for group in groups]
        if advance is not None:
            advance(len(groups))
        pairs = [pair for g, w in zip(groups, weights, strict=True) for pair in zip(g.completions, w, strict=True)]
        tokens = sum(len(completion) for completion, weight in pairs if weight)
        products_NV = np.array(sums).reshape(len(groups), sets)
        return Scored(products_NV, np.ones(len(groups)), np.ones((len(groups), 3)), None, tokens)

    def values(self, scored: Scored) -> np.ndarray:
        return scored.products_NV


def pool_of(count: int, *, noise: float = 1.0, sets: int = 2, seed: int = 0) -> tuple[list[Group], Table]:
    """Groups of 8 with 1 to 7 right, and contributions of each trajectory: a mean by group and noise around it."""
    rng = np.random.default_rng(seed)
    groups, table = [], {}
    for row in range(count):
        right = 1 + row % 7
        groups.append(group_of(f"p{row:04}", [1.0] * right + [0.0] * (8 - right)))
        table[f"p{row:04}"] = rng.normal(size=(1, sets)) + noise * rng.normal(size=(8, sets))
    return groups, Table(table)


def full_values(groups: Sequence[Group], table: Table) -> np.ndarray:
    return np.array([table.contributions[group.prompt_id].sum(axis=0) for group in groups])


def cut_of(groups: Sequence[Group], fraction: float = 0.1) -> Cut:
    return Cut([g.prompt_id for g in groups], np.ones(len(groups), dtype=bool), math.ceil(fraction * len(groups)))


# ---- sub-samples


def test_a_subsample_is_balanced_and_weighs_what_it_stands_for() -> None:
    factors = subsample_factors(group_of("p", [1, 1, 0, 0, 0, 0, 0, 0]), 4, seed=0)
    assert sorted(factors[:2]) == [1.0, 1.0]
    assert sorted(factors[2:]) == [0, 0, 0, 0, 3.0, 3.0]


def test_a_subsample_depends_on_seed_and_prompt_alone() -> None:
    rewards = [1, 1, 1, 1, 0, 0, 0, 0]
    draws = {
        (seed, name): tuple(subsample_factors(group_of(name, rewards), 4, seed)) for seed in range(4) for name in "abcd"
    }
    assert len(set(draws.values())) > 8
    assert draws == {key: tuple(subsample_factors(group_of(key[1], rewards, [9] * 8), 4, key[0])) for key in draws}


def test_over_seeds_each_trajectory_weighs_one() -> None:
    group = group_of("p", [1, 0.5, 0.5, 0, 0, 0, 0, 0])
    mean_K = np.mean([subsample_factors(group, 3, seed) for seed in range(4000)], axis=0)
    assert mean_K == pytest.approx(np.ones(8), abs=0.1)


def test_what_contributes_nothing_is_not_drawn() -> None:
    assert subsample_factors(group_of("middling", [1, 0.5, 0]), 2, seed=0) == [1.0] * 3
    assert subsample_factors(group_of("empty", [1, 1, 0, 0], [2, 0, 0, 2]), 2, seed=0) == [1.0] * 4


def test_averaged_over_all_draws_the_real_scores_are_the_full_ones() -> None:
    settings = SurrogateSettings("token", max_completion_length=8)
    group = Group("p", [3, 4, 5], [[7, 8, 1], [9, 1], [2, 2, 2, 2], [1], [10, 11, 1]], [1, 0, 0, 1, 0], None)
    scorer = Scorer(tiny_llama(), settings, estimator="exact")
    scorer.aim({"v": [Group("q", [8, 9], [[5, 1], [6, 7, 1]], [1, 0], None)]})
    draws = []
    for right, wrong in product([0, 3], [1, 2, 4]):
        factors = [0.0] * 5
        factors[right], factors[wrong] = 2.0, 3.0
        draws.append(scorer([group], factors=[factors]).products_NV[0])
    assert np.mean(draws, axis=0) == pytest.approx(scorer([group]).products_NV[0], rel=1e-4)


# ---- cascade


def test_without_a_budget_scores_are_the_scorer_s_own() -> None:
    groups, table = pool_of(30)
    found = budgeted(table, groups, FULL, seed=0)
    assert np.allclose(found.values_NV, full_values(groups, table))
    assert found.how == ["full"] * 30
    assert found.trajectories_scored == 240
    assert found.tokens_computed == 480


def test_contenders_are_scored_in_full_and_the_others_once() -> None:
    groups, table = pool_of(200, noise=0.3)
    told: list[int] = []
    found = budgeted(table, groups, CASCADE, seed=0, advance=told.append)
    full = [row for row, how in enumerate(found.how) if how == "full"]
    assert 60 <= len(full) < 70  # ceil(0.3 x 200), and the few that the last look adds
    assert np.allclose(found.values_NV[full], full_values(groups, table)[full])
    assert set(cut_of(groups).above(found.values_NV)) <= set(full)
    assert sum(told) == len(table.calls) == 200 + len(full)
    assert found.trajectories_scored == 200 * 2 + len(full) * 8
    assert np.isfinite(found.norms_N).all()


def test_contenders_are_the_best_of_every_list() -> None:
    groups, table = pool_of(100, sets=3)
    values_NV = full_values(groups, table)
    chosen = set(cut_of(groups).contenders(values_NV, 30))
    assert len(chosen) == 30
    for v in range(3):
        assert set(np.argsort(-values_NV[:, v])[:7].tolist()) <= chosen
    assert set(cut_of(groups).above(values_NV)[:7]) <= chosen


def test_a_selection_is_never_made_on_a_subsample() -> None:
    # Contenders by chance: what they turn out to be leaves room for rows that nobody looked at closely.
    groups, table = pool_of(200, noise=30.0)
    for seed in range(5):
        found = budgeted(table, groups, BudgetSettings(2, 0.1, rescore=False, fraction=0.1), seed=seed)
        assert {found.how[row] for row in cut_of(groups).above(found.values_NV)} == {"full"}


def test_a_subsample_that_holds_all_is_full() -> None:
    groups = [group_of("a", [1, 0]), group_of("b", [1, 1, 0, 0])]
    table = Table({"a": np.ones((2, 1)), "b": np.ones((4, 1))})
    found = budgeted(table, groups, BudgetSettings(2, None, rescore=False, fraction=0.5), seed=0)
    assert found.how == ["full", "subsampled"]


def test_scores_do_not_depend_on_the_order_of_groups() -> None:
    groups, table = pool_of(150)
    previous_NV = full_values(groups, table) + 1.0
    settings = BudgetSettings(4, 0.2, rescore=True, fraction=0.1)

    def by_id(turned: list[int]) -> dict[str, tuple[str, list[float]]]:
        found = budgeted(table, [groups[row] for row in turned], settings, previous_NV[turned], seed=3)
        return {
            groups[row].prompt_id: (found.how[n], found.values_NV[n].round(9).tolist()) for n, row in enumerate(turned)
        }

    order = list(range(150))
    assert by_id(order) == by_id(order[::-1])


def test_groups_without_signal_cost_nothing_and_a_broken_one_is_not_chosen() -> None:
    groups, table = pool_of(100)
    groups[5] = group_of("p0005", [1.0] * 8)
    table.contributions = dict(table.contributions) | {"p0007": np.full((8, 2), np.nan)}
    for settings in (CASCADE, BudgetSettings(2, 0.3, rescore=True, fraction=0.1)):
        table.calls = []
        found = budgeted(table, groups, settings, np.ones((100, 2)), seed=0)
        assert found.how[5] == "full"
        assert found.values_NV[5].tolist() == [0, 0]
        assert "p0005" not in table.calls
        assert 7 not in cut_of(groups).above(found.values_NV)
        assert np.isfinite(np.delete(found.values_NV, 7, axis=0)).all()


def test_nothing_to_score() -> None:
    groups = [group_of("a", [1.0, 1.0])]
    found = budgeted(Table({"a": np.ones((2, 1))}), groups, CASCADE, seed=0)
    assert (found.how, found.tokens_computed) == (["full"], 0)


@pytest.mark.parametrize("truncate", [False, True])
def test_the_cut_is_the_one_that_selection_will_make(truncate: bool) -> None:
    rng = np.random.default_rng(0)
    values_NV = np.vstack([rng.normal(size=(40, 3)), np.zeros((60, 3))])  # 60 prompts of the pool without signal
    ids = [f"p{row:04}" for row in range(100)]
    statuses = ["ok"] * 40 + ["no_signal"] * 60
    influence_by_set = {f"v{v}": values_NV[:, v] for v in range(3)}
    candidates = Candidates(ids, [""] * 100, statuses, np.zeros(100), np.zeros(100), {}, influence_by_set, 0, 0)
    strategy = InfluenceStrategy(type="influence")
    ranking = strategy.rank(candidates, 10, FusionConfig(truncate=truncate))
    best = sorted(range(40), key=lambda row: (-ranking.scores_N[row], ids[row]))[:10]
    cut = Cut(ids[:40], np.ones(40, dtype=bool), 10, absent=60, depth=10 if truncate else None)
    assert cut.above(values_NV[:40]) == best


# ---- re-scoring


def rescored(previous_NV: np.ndarray, new_NV: np.ndarray, seed: int = 0) -> tuple[np.ndarray, Cut, Rescoring]:
    """Which rows a re-scoring asks for, run to its end."""
    cut = cut_of([group_of(f"p{row:04}", [1, 0]) for row in range(len(new_NV))])
    rescoring, scored_N = Rescoring(previous_NV, cut, seed), np.zeros(len(new_NV), dtype=bool)
    rows = rescoring.first()
    while rows:
        assert not scored_N[rows].any()
        scored_N[rows] = True
        rows = rescoring.following(np.where(scored_N[:, None], new_NV, 0.0), scored_N)
    return scored_N, cut, rescoring


def test_a_policy_that_stood_still_needs_the_probe_and_the_selected() -> None:
    previous_NV = np.random.default_rng(0).normal(size=(1000, 2))
    scored_N, cut, rescoring = rescored(previous_NV, 0.2 + 3.0 * previous_NV)
    assert set(np.flatnonzero(scored_N)) == {*rescoring.probe, *cut.above(previous_NV)}
    assert len(rescoring.probe) == 50


@pytest.mark.parametrize("spread", [0.1, 0.3, 1.0])
def test_rows_left_out_cross_no_more_often_than_they_may(spread: float) -> None:
    missed = allowed = 0.0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        previous_NV = rng.normal(size=(1000, 1))
        expected_N = 0.5 * previous_NV[:, 0] - 0.1
        new_NV = expected_N[:, None] + spread * rng.normal(size=(1000, 1))
        scored_N, cut, _ = rescored(previous_NV, new_NV, seed)
        last = np.sort(new_NV[:, 0])[-cut.places]
        missed += (new_NV[~scored_N, 0] >= last).sum()
        # What a rule that knew line and spread would miss: rows whose known probability to cross is at most 5 %.
        chances_N = np.array([1 - NormalDist(mu, spread).cdf(last) for mu in expected_N])
        allowed += chances_N[chances_N <= 0.05].sum()
    assert missed <= allowed
    assert missed < 0.05 * 20 * 100


def test_a_policy_beyond_recognition_is_scored_anew() -> None:
    rng = np.random.default_rng(0)
    scored_N, _, _ = rescored(rng.normal(size=(500, 2)), rng.normal(size=(500, 2)))
    assert scored_N.mean() > 0.9


def test_rows_not_scored_again_keep_a_prediction_and_say_so() -> None:
    groups, table = pool_of(400, noise=0.1)
    true_NV = full_values(groups, table)
    previous_NV = (true_NV - 0.5) / 2.0
    previous_NV[3] = np.nan
    found = budgeted(table, groups, AGAIN, previous_NV, seed=0)
    predicted = [row for row, how in enumerate(found.how) if how == "predicted"]
    assert len(table.calls) == 400 - len(predicted) < 120
    assert found.how[3] == "full"
    assert np.allclose(found.values_NV, true_NV)
    assert np.isnan(found.norms_N[predicted]).all()
    assert np.isnan(found.ratio_facts_NR[predicted]).all()


def test_stages_share_their_subsamples_and_not_their_probe() -> None:
    groups, table = pool_of(400, noise=0.1)
    settings = BudgetSettings(2, None, rescore=True, fraction=0.1)
    first = budgeted(table, groups, settings, seed=0, stage=0)
    second = budgeted(table, groups, settings, first.values_NV, seed=0, stage=1)
    third = budgeted(table, groups, settings, first.values_NV, seed=0, stage=2)
    assert second.how != third.how
    assert np.allclose(first.values_NV, second.values_NV)  # nothing has changed, and the line finds that out


def test_a_small_pool_is_scored_whole() -> None:
    groups, table = pool_of(20)
    assert budgeted(table, groups, AGAIN, full_values(groups, table), seed=0).how == ["full"] * 20


def test_all_three_together() -> None:
    groups, table = pool_of(500, noise=0.2)
    true_NV = full_values(groups, table)
    found = budgeted(table, groups, BudgetSettings(4, 0.15, rescore=True, fraction=0.1), true_NV, seed=0)
    assert set(found.how) == {"full", "subsampled", "predicted"}
    assert {found.how[row] for row in cut_of(groups).above(found.values_NV)} == {"full"}
    cut = cut_of(groups)
    assert len({*cut.above(found.values_NV)} & {*cut.above(true_NV)}) >= 45


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trajectories": 1}, "better and a worse"),
        ({"contenders": 0.3}, "without trajectories"),
        ({"trajectories": 2, "contenders": 0.05}, r"from 0.1 \(fraction\) to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BudgetSettings(**({"trajectories": None, "contenders": None, "rescore": False, "fraction": 0.1} | settings))


def test_the_reference_estimator_takes_no_subsample() -> None:
    groups, table = pool_of(3)
    table.estimator = "reference"
    with pytest.raises(ValueError, match="estimator='exact' or 'sketch'"):
        budgeted(table, groups, CASCADE, seed=0)


# ---- with the real engine


@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_the_engine_under_a_budget(estimator: str, score: str) -> None:
    rng = np.random.default_rng(0)

    def draw(name: str) -> Group:
        completions = [rng.integers(2, 13, size=rng.integers(1, 6)).tolist() for _ in range(6)]
        return Group(name, [3, 4, 5], completions, rng.permutation([1.0, 1.0, 0, 0, 0, 0]).tolist(), None)

    groups = [draw(f"p{row:02}") for row in range(40)]
    scorer = Scorer(tiny_llama(), SurrogateSettings("sequence", 8), estimator=estimator, score=score)
    scorer.aim({"v": [draw("v0"), draw("v1")], "w": [draw("w0")]})
    full = scorer(groups)

    def run() -> BudgetedScores:
        return budgeted(scorer, groups, BudgetSettings(2, 0.3, rescore=False, fraction=0.1), seed=0)

    found = run()
    rows = [row for row, how in enumerate(found.how) if how == "full"]
    assert 12 <= len(rows) < 20
    np.testing.assert_allclose(found.values_NV[rows], scorer.values(full)[rows], rtol=1e-3, atol=1e-6)
    assert found.tokens_computed < full.tokens_computed
    assert np.array_equal(found.values_NV, run().values_NV)
