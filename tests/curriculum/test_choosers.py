"""Strategies that choose every generation batch by rewards: their beliefs by hand, their choices, and their state."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from cropi.curriculum.chooser import NEVER, Choice, Pool, RewardChooser, rested
from cropi.curriculum.strategies.bmc import Bmc, BmcStrategy, Cluster, _Node, prompt_tree
from cropi.curriculum.strategies.bots import BotsStrategy
from cropi.curriculum.strategies.lze import LzeStrategy
from cropi.curriculum.strategies.mopps import MoppsStrategy
from cropi.curriculum.strategies.similarity_learnability import SimilarityLearnabilityStrategy
from cropi.curriculum.strategies.thompson import ThompsonStrategy
from cropi.errors import ArtifactError

HALF = [1.0, 0.0] * 4
NONE, ALL = [0.0] * 8, [1.0] * 8


def pool(size: int = 60, seed: int = 0) -> Pool:
    """Three kinds of prompts, in turn; the only validation set is of kind 0."""
    generator = np.random.default_rng(5)
    kinds = np.arange(size) % 3
    states = 4 * np.eye(8)[kinds] + 0.3 * generator.standard_normal((size, 8))
    of_set = 4 * np.eye(8)[[0] * 6] + 0.3 * generator.standard_normal((6, 8))
    names = ["add the numbers", "turn the word", "walk the streets"]
    return Pool(
        [f"p{n:03}" for n in range(size)],
        seed,
        sources=[f"kind {kind}" for kind in kinds],
        texts=[f"{names[kind]} {n}" for n, kind in enumerate(kinds)],
        validation_texts={"wanted": [f"{names[0]} {n}" for n in (900, 901)]},
        states_NE=states.astype(np.float32),
        validation_states={"wanted": of_set.astype(np.float32)},
    )


MAKE: dict[str, Callable[[Pool], RewardChooser]] = {
    "words": SimilarityLearnabilityStrategy(type="similarity_learnability", by="words").chooser,
    "hidden": SimilarityLearnabilityStrategy(type="similarity_learnability", by="hidden").chooser,
    "mopps": MoppsStrategy(type="mopps").chooser,
    "bots": BotsStrategy(type="bots").chooser,
    "thompson": ThompsonStrategy(type="thompson").chooser,
    "lze": LzeStrategy(type="lze").chooser,
    "bmc": BmcStrategy(type="bmc").chooser,
    "bmc-t": BmcStrategy(type="bmc", utility=0.25, visit_all_first=False).chooser,
}


def tell(chooser: RewardChooser, place: int, rewards: list[float], step: int, group: str = "") -> None:
    chooser.observe(Choice(place, "draw", ""), rewards, step=step, group=group or f"{step}-{place}")


def steps(chooser: RewardChooser, first: int, last: int) -> list[list[int]]:
    """Batches, whose rewards come one batch late; prompts of kind 2 are never solved."""
    chosen = []
    for step in range(first, last):
        chosen.append([choice.place for choice in chooser.next(8, step)])
        generator = np.random.default_rng([9, step])
        for place in generator.permutation(60)[:8]:
            rewards = NONE if place % 3 == 2 else (generator.random(8) < 0.4).astype(float).tolist()
            tell(chooser, int(place), rewards, step)
    return chosen


def state_of(chooser: RewardChooser) -> dict[str, bytes]:
    return {name: values.tobytes() for name, values in chooser.state_dict().items()}


@pytest.mark.parametrize("name", sorted(MAKE))
def test_ten_steps_equal_five_a_state_and_five(name: str) -> None:
    whole, first, second = (MAKE[name](pool()) for _ in range(3))
    chosen = steps(whole, 0, 10)
    begun = steps(first, 0, 5)
    second.load_state_dict(first.state_dict())
    assert begun + steps(second, 5, 10) == chosen
    assert state_of(whole) == state_of(second)


@pytest.mark.parametrize("name", sorted(MAKE))
def test_batches_have_different_prompts_and_small_pools_are_used_up(name: str) -> None:
    chooser = MAKE[name](pool())
    batches = [[choice.place for choice in chooser.next(8, step)] for step in range(12)]  # nothing is observed
    assert all(len(set(batch)) == 8 for batch in batches)
    assert sorted(choice.place for choice in MAKE[name](pool(6)).next(8, 0)) == list(range(6))


@pytest.mark.parametrize("name", sorted(MAKE))
def test_a_group_counts_once_and_late_ones_count(name: str) -> None:
    chooser = MAKE[name](pool())
    tell(chooser, 0, HALF, 4, "a")
    before = state_of(chooser)
    tell(chooser, 0, ALL, 5, "a")
    assert state_of(chooser) == before
    tell(chooser, 1, [1.0, 0.0, 0.0], 2, "late")  # of another size
    assert any(before[key] != after for key, after in state_of(chooser).items() if key != "facts")


@pytest.mark.parametrize("name", sorted(MAKE))
def test_rewards_of_any_size_are_learned_from(name: str) -> None:
    """As those from 0 to 1 that they are mapped to."""
    plain, wide = MAKE[name](pool()), MAKE[name](pool())
    for step in range(4):
        for chooser, low, width in ((plain, 0.0, 1.0), (wide, -3.0, 8.0)):
            generator = np.random.default_rng(step)
            for place in [choice.place for choice in chooser.next(8, step)]:
                rewards = low + width * np.array([0.0, 1.0, *generator.random(6)])
                tell(chooser, place, rewards.tolist(), step)
    np.testing.assert_array_equal(plain.times_N, wide.times_N)


def test_prompts_rest_until_they_were_observed_where_a_batch_serves_many_steps() -> None:
    last_N = np.full(6, NEVER)
    assert rested(last_N, 0, 3, 2).all()
    last_N[:2] = 0
    assert rested(last_N, 4, 3, 2).tolist() == [False] * 2 + [True] * 4
    last_N[2:4] = 4
    assert rested(last_N, 8, 3, 2).tolist() == [False] * 4 + [True] * 2
    last_N[4:] = 8
    assert rested(last_N, 12, 3, 2).tolist() == [True] * 2 + [False] * 4
    assert rested(np.array([7, 8, 9, 5]), 9, 3, 1).tolist() == [False] * 3 + [True]


def test_a_state_of_other_prompts_is_refused() -> None:
    with pytest.raises(ArtifactError, match="other prompts"):
        MAKE["mopps"](pool(12)).load_state_dict(MAKE["mopps"](pool(13)).state_dict())


@pytest.mark.parametrize("name", sorted(MAKE))
def test_the_table_has_a_row_for_every_prompt(name: str) -> None:
    chooser = MAKE[name](pool())
    steps(chooser, 0, 3)
    table = chooser.table(pool().prompt_ids)
    assert len(table) == 60
    assert sum(table.column("times_drawn").to_pylist()) == 24
    assert len(table.column_names) > 2


# -- MoPPS ---------------------------------------------------------------------------------------------------------


def test_mopps_by_hand() -> None:
    chooser = MAKE["mopps"](pool())
    tell(chooser, 3, [1, 1, 1, 1, 1, 1, 0, 0], 0)
    tell(chooser, 3, [1, 0, 0, 0], 1)
    tell(chooser, 4, ALL, 1)
    # 1 + 6 and 1 + 2; then half of these, half of the prior, and 1 and 3
    assert (chooser.a_N[3], chooser.b_N[3]) == (0.5 * 7 + 0.5 + 1, 0.5 * 3 + 0.5 + 3)
    assert (chooser.a_N[4], chooser.b_N[4]) == (9, 1)
    assert (chooser.a_N[5], chooser.b_N[5]) == (1, 1)  # what was not drawn keeps its evidence


def test_mopps_takes_what_is_half_solved_of_its_candidates() -> None:
    chooser = MoppsStrategy(type="mopps", candidates=60, kept=1.0).chooser(pool())
    for step in range(30):
        for place in range(60):
            tell(chooser, place, HALF if place < 8 else ALL, step)
    assert {choice.place for choice in chooser.next(8, 30)} == set(range(8))
    few = MoppsStrategy(type="mopps", candidates=1).chooser(pool())
    counts = Counter(choice.place for step in range(300) for choice in few.next(8, step))
    assert all(abs(counts[place] - 40) < 4 * (300 * 8 / 60) ** 0.5 for place in range(60))  # candidates are random


# -- BOTS ----------------------------------------------------------------------------------------------------------


def test_bots_forgets_once_a_step_and_everywhere() -> None:
    chooser = MAKE["bots"](pool())
    tell(chooser, 3, [1, 1, 1, 0], 0)
    tell(chooser, 4, [0, 0], 0)  # the same step: nothing more is forgotten
    assert (chooser.a_N[3], chooser.b_N[3], chooser.a_N[4], chooser.b_N[4]) == (4, 2, 1, 3)
    tell(chooser, 4, ALL, 1)
    np.testing.assert_allclose([chooser.a_N[3], chooser.b_N[3]], [0.9 * 4 + 0.1, 0.9 * 2 + 0.1])
    np.testing.assert_allclose([chooser.a_N[4], chooser.b_N[4]], [9, 0.9 * 3 + 0.1])


# -- LZE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "energy"), enumerate([0, 0.383, 0.562, 0.586, 0.5, 0.352, 0.188, 0.055, 0]), ids=range(9)
)
def test_lze_s_energy_at_the_first_visit(right: int, energy: float) -> None:
    chooser = MAKE["lze"](pool())
    assert chooser.energy(0, [1.0] * right + [0.0] * (8 - right)) == pytest.approx(energy, abs=6e-4)


def test_lze_s_energy_later_by_hand() -> None:
    chooser = MAKE["lze"](pool())
    tell(chooser, 0, [1.0] * 6 + [0.0] * 2, 0)
    tell(chooser, 0, HALF, 1)
    assert chooser.mean_N[0] == pytest.approx(0.9 * 0.75 + 0.1 * 0.5)
    # D stays 1/4 of the first visit, and the rate is 0.25 where the running mean is 0.725
    expected = 0.25 * 4 * 0.25 * 0.75 * (1 + 0.3 * 2 * 0.475)
    assert chooser.energy(0, [1.0] * 2 + [0.0] * 6) == pytest.approx(expected)


def test_lze_keeps_the_best_groups_and_one_where_all_are_dead() -> None:
    chooser = MAKE["lze"](pool())
    good, poor = [1.0] * 3 + [0.0] * 5, [1.0] * 7 + [0.0]  # 0.586 and 0.055
    groups = [(0, poor), (1, good), (2, NONE), (3, good), (4, ALL), (5, poor), (6, good), (7, NONE)]
    assert chooser.kept(groups, 0) == [1, 3, 6]  # 0.4 of 8
    assert chooser.kept([(0, NONE), (1, good), (2, ALL), *groups[:1]] + [(7, NONE)] * 4, 0) == [1, 3]
    assert chooser.kept([(0, NONE), (1, ALL)], 0) == [0]
    passes = [choice.place for step in range(15) for choice in chooser.next(8, step)]
    assert set(Counter(passes).values()) == {2}


# -- Thompson ------------------------------------------------------------------------------------------------------


def test_thompson_counts_by_hand() -> None:
    chooser = MAKE["thompson"](pool())
    tell(chooser, 0, HALF, 0)
    tell(chooser, 3, ALL, 0)  # kind 0 too, and not informative
    tell(chooser, 1, HALF, 1)
    np.testing.assert_allclose(chooser.informative_B, [0.95 * 2 + 1, 0.95 * 1 + 1 + 1, 0.95 * 1 + 1])
    np.testing.assert_allclose(chooser.groups_B, [0.95 * 4 + 2, 0.95 * 2 + 2 + 1, 0.95 * 2 + 2])


def test_thompson_leaves_a_source_that_gives_nothing_and_comes_back() -> None:
    chooser = MAKE["thompson"](pool())
    for step in range(80):
        for place in range(60):
            tell(chooser, place, NONE if place % 3 == 2 else HALF, step)
    drawn = Counter(choice.place % 3 for step in range(80, 280) for choice in chooser.next(4, step))
    assert 0 < drawn[2] < 0.15 * sum(drawn.values())
    for step in range(80, 200):  # starved: pseudo-groups alone
        tell(chooser, 0, HALF, step)
    assert chooser.informative_B[2] / chooser.groups_B[2] > 0.45


# -- similarity x learnability -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["words", "hidden"])
def test_similar_prompts_come_first_and_those_that_are_solved_go(name: str) -> None:
    chooser = MAKE[name](pool())
    assert all(choice.place % 3 == 0 for choice in chooser.next(8, 0))
    chooser = MAKE[name](pool())
    for place in range(0, 60, 3):
        tell(chooser, place, HALF if place in (6, 9) else ALL, 0)
    assert {choice.place for choice in chooser.next(2, 1)} == {6, 9}


def test_a_prompt_rests_for_eight_steps_and_sets_share_the_places() -> None:
    chooser = MAKE["hidden"](pool())
    batches = [{choice.place for choice in chooser.next(2, step)} for step in range(10)]
    assert len(set.union(*batches[:9])) == 18
    assert batches[9] == batches[0]  # nothing was observed, so the first come again
    both = pool()
    two = dict(both.validation_states) | {"other": both.states_NE[1::3][:6]}
    chosen = SimilarityLearnabilityStrategy(type="similarity_learnability").chooser(
        Pool(both.prompt_ids, 0, states_NE=both.states_NE, validation_states=two)
    )
    kinds = Counter((choice.validation_set, choice.place % 3) for step in range(40) for choice in chosen.next(2, step))
    assert set(kinds) == {("wanted", 0), ("other", 1)}
    assert abs(kinds["wanted", 0] - 40) < 4 * 20**0.5


def test_the_score_by_hand() -> None:
    states = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]], dtype=np.float32)
    wanted = {"wanted": np.array([[2.0, 0.0]], dtype=np.float32)}
    small = Pool(["a", "b", "c", "d"], 0, states_NE=states, validation_states=wanted)
    chooser = SimilarityLearnabilityStrategy(type="similarity_learnability").chooser(small)
    likeness = chooser.columns()["similarity/wanted"]
    np.testing.assert_allclose(likeness, [0.8, 0.6, 0, 0], atol=1e-6)  # cosines 1, 0.8, 0, -1 have the mean 0.2
    assert [choice.place for choice in chooser.next(2, 0)] == [0, 1]


# -- BMC -----------------------------------------------------------------------------------------------------------

LOGITS = [-4.143, -0.251, 1.099, 2.708, 4.143, 2.708, 1.099, -0.251, -4.143]


def bmc(visit_all_first: bool = True, utility: float = 0.0) -> Bmc:
    return BmcStrategy(type="bmc", utility=utility, visit_all_first=visit_all_first).chooser(pool())


@pytest.mark.parametrize("right", range(9))
def test_bmc_s_first_visit(right: int) -> None:
    chooser = bmc()
    tell(chooser, 0, [1.0] * right + [0.0] * (8 - right), 0)
    assert chooser.mean_N[0] == pytest.approx(LOGITS[right] / 2, abs=1e-3)
    assert (chooser.count_N[0], chooser.variance_N[0]) == (2, pytest.approx(1.401, abs=1e-3))


def test_bmc_s_later_visits_by_hand() -> None:
    chooser = bmc()
    tell(chooser, 0, [1.0] * 2 + [0.0] * 6, 0)  # logit 1.0986
    tell(chooser, 0, [1.0] * 3 + [0.0] * 5, 4)  # logit 2.7081, after 3 steps without it
    seen, mean, variance = np.log(15.0), np.log(3.0) / 2, (np.log(63.0) / 3.5) ** 2
    surprise = (seen - mean) ** 2 / variance
    kept = max(0.2, 2 * np.exp(-surprise))
    wider = variance * kept / (kept + 1) + np.log1p(surprise + 3 * 8 / 60) / (kept + 1)
    assert chooser.mean_N[0] == pytest.approx((kept * mean + seen) / (kept + 1))
    assert chooser.count_N[0] == pytest.approx(kept + 1)
    assert chooser.variance_N[0] == pytest.approx(min(wider, (np.log(63.0) / 3) ** 2))


def test_bmc_visits_all_prompts_before_it_chooses() -> None:
    chooser = bmc()
    first = [choice.place for step in range(7) for choice in chooser.next(8, step)]
    assert len(set(first)) == 56
    assert [choice.source for choice in chooser.next(8, 7)] == ["uniform"] * 4 + ["draw"] * 4
    assert {choice.source for choice in bmc(visit_all_first=False).next(8, 0)} == {"draw"}


def test_bmc_joins_beliefs_by_precision() -> None:
    chooser = bmc()
    leaf = _Node([], np.array([0, 1]))
    chooser.mean_N[:2], chooser.variance_N[:2] = [1.0, 3.0], [0.5, 0.5]
    chooser.aggregate(leaf)
    assert (leaf.mean, leaf.spread) == (2, 0.5)  # variance of the means 1, of which 0.5 is their own
    assert leaf.variance == pytest.approx(0.5)  # two of 0.5 + 0.5


def test_bmc_t_s_utilities_by_hand() -> None:
    # 4 prompts of the pool and 2 targets, one of each in a cluster, which leaves two clusters with pool prompts alone
    leaves = [Cluster((), np.array(points)) for points in ([0, 4], [1], [2, 3], [5])]
    tree = Cluster(tuple(leaves), np.arange(6))
    chooser = Bmc(Pool(["a", "b", "c", "d"], 0), tree, {"wanted": 2}, 0.25, False)
    added = 0.05 / 4
    gates = [size / (size + 0.04) for size in (1, 1, 2)]
    shares = [(held + added) / (1 + 4 * added) for held in (0.5, 0, 0)]
    found = [node.utility for node in chooser.tree.children]  # a cluster without a pool prompt is left out
    np.testing.assert_allclose(found, [share * gate for share, gate in zip(shares, gates, strict=True)])


def test_the_tree_finds_the_kinds() -> None:
    own = pool(120)
    tree = prompt_tree(own.states_NE)
    kinds = [{int(row) % 3 for row in leaf.points} for leaf in tree.leaves()]
    assert all(len(kind) == 1 for kind in kinds)
    assert sorted(row for leaf in tree.leaves() for row in leaf.points.tolist()) == list(range(120))
    alike = prompt_tree(np.ones((30, 4)))
    assert not alike.children
