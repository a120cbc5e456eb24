"""The curriculum as a whole: what it chooses, what it learns from, and how it goes on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from cropi.curriculum.chooser import Choice
from cropi.curriculum.curriculum import COOLDOWN, Curriculum, even_counts
from cropi.errors import ArtifactError
from cropi.functional.intervals import ratio_interval


class World:
    """Two kinds of prompts in two places: those of kind 0 help the validation set, the others do what `other` says."""

    def __init__(self, pool: int = 80, seed: int = 0, look_alike: bool = False, other: float = -1.0) -> None:
        generator = np.random.default_rng(seed)
        self.kinds = np.arange(pool) % 2
        centres = np.array([[-2.0, 0.0], [2.0, 0.0]])
        self.points = centres[self.kinds] + 0.3 * generator.standard_normal((pool, 2))
        target = centres[1 if look_alike else 0]
        self.validation = {"v": target + 0.3 * generator.standard_normal((10, 2))}
        self.generator, self.slopes = generator, (1.0, other)

    def group(self, choice: Choice) -> tuple[list[float], dict[str, np.ndarray]]:
        rewards = (self.generator.random(8) < 0.5).astype(float)
        halves = self.slopes[self.kinds[choice.place]] * rewards.std(ddof=1) / 2 + 0.2 * self.generator.standard_normal(
            (2, 2)
        )
        return rewards.tolist(), {"v": halves}


def made(world: World, **options: object) -> Curriculum:
    return Curriculum(world.points, world.validation, **{"seed": 0, **options})  # type: ignore[arg-type]


def trained(curriculum: Curriculum, world: World, steps: range, lag: int = 0) -> Iterator[list[Choice]]:
    """Choices by step; rewards arrive `lag` steps later."""
    waiting = []
    for step in steps:
        choices = curriculum.next(8, step)
        waiting.append((step, choices))
        yield choices
        if len(waiting) > lag:
            at, known = waiting.pop(0)
            for n, choice in enumerate(known):
                rewards, influence = world.group(choice)
                curriculum.observe(choice, rewards, step=at, group=f"{at}/{n}", influence=influence)


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("look_alike", [False, True])
def test_it_learns_what_helps_whatever_the_prompts_look_like(lag: int, look_alike: bool) -> None:
    world = World(pool=400, look_alike=look_alike)
    choices = [c for batch in trained(made(world), world, range(40), lag) for c in batch][160:]
    chosen = [c for c in choices if c.source != "uniform"]
    assert np.mean([world.kinds[c.place] == 0 for c in chosen]) > 0.9
    assert 0.04 < np.mean([c.source == "uniform" for c in choices]) < 0.2


def test_before_a_direction_is_known_likeness_and_learnability_choose() -> None:
    world = World()
    curriculum = made(world)
    solved = [int(place) for place in np.flatnonzero(world.kinds == 0)[:20]]
    for place in solved:
        curriculum.observe(Choice(place, "uniform", ""), [1.0] * 8, step=0, group=str(place))  # rewards alone
    chosen = [c for c in curriculum.next(8, 1) if c.source != "uniform"]
    assert all(world.kinds[c.place] == 0 and c.place not in solved for c in chosen)


def test_drawn_prompts_rest_though_nothing_was_observed() -> None:
    curriculum = made(World(pool=200))
    batches = [curriculum.next(8, step) for step in range(COOLDOWN + 1)]
    places = [c.place for batch in batches for c in batch]
    assert len(set(places)) == len(places)
    small = made(World(pool=10))
    assert [len({c.place for c in small.next(8, step)}) for step in range(4)] == [8] * 4
    assert len(made(World(pool=4)).next(8, 0)) == 4
    assert len(made(World(pool=1)).next(1, 0)) == 1


def test_it_goes_on_from_its_state_bit_for_bit() -> None:
    def run(stop: int | None) -> list[list[Choice]]:
        world = World()
        curriculum, batches = made(world), list[list[Choice]]()
        for part in (range(10),) if stop is None else (range(stop), range(stop, 10)):
            if part.start:
                state = curriculum.state_dict()
                curriculum = made(world)
                curriculum.load_state_dict(state)
            batches += list(trained(curriculum, world, part))
        return batches

    assert run(5) == run(3) == run(None)


def test_a_group_counts_once_and_its_order_does_not_matter() -> None:
    world = World()
    told = [(Choice(n, "uniform", ""), *world.group(Choice(n, "uniform", ""))) for n in range(12)]

    def after(order: list[int]) -> dict[str, np.ndarray]:
        curriculum = made(world)
        for n in order:
            choice, rewards, influence = told[n]
            curriculum.observe(choice, rewards, step=0, group=str(n), influence=influence)
        return curriculum.table([str(n) for n in range(80)]).to_pydict()

    plain = after(list(range(12)))
    assert after([*range(12), 3, 5]) == plain
    other = after(list(range(12))[::-1])
    for name in ("pass_rate", "influence/v", "standard_error/v"):
        np.testing.assert_allclose(other[name], plain[name], rtol=1e-6)


def test_equal_rewards_and_single_completions_are_no_evidence_of_influence() -> None:
    world = World()
    curriculum = made(world)
    for n, rewards in enumerate(([1.0] * 8, [0.0] * 4, [1.0])):
        curriculum.observe(Choice(n, "uniform", ""), rewards, step=0, group=str(n), influence={"v": [[9, 9], [9, 9]]})
    assert "influence/v" not in curriculum.table([str(n) for n in range(80)]).column_names


def test_rewards_that_hardly_differ_are_no_evidence_of_influence() -> None:
    """Neither by rounding nor beside groups that differ: divided by so little, their noise would drown the others."""
    world, places = World(), [str(n) for n in range(80)]
    curriculum = made(world)
    same = [0.1 + 0.2 - 0.2] * 7
    curriculum.observe(Choice(0, "uniform", ""), same, step=0, group="same", influence={"v": [[9, 9], [9, 9]]})
    assert "influence/v" not in curriculum.table(places).column_names
    for n in range(1, 40):
        rewards, influence = world.group(Choice(n, "uniform", ""))
        curriculum.observe(Choice(n, "uniform", ""), rewards, step=0, group=str(n), influence=influence)
    before = curriculum.table(places)["influence/v"].to_numpy()
    near = [0.5, 0.501] * 4
    curriculum.observe(Choice(0, "uniform", ""), near, step=0, group="near", influence={"v": [[9, -9], [9, 9]]})
    after = curriculum.table(places)["influence/v"].to_numpy()
    assert np.corrcoef(before, after)[0, 1] > 0.9


def test_what_choosing_gains_is_known_and_choosing_is_halved_until_it_helps_again() -> None:
    world = World(pool=400, other=0.2)
    curriculum = made(world)
    assert curriculum.gain() is None
    list(trained(curriculum, world, range(60)))
    ratio, low, high = curriculum.gain()
    assert 1 < low <= ratio <= high
    assert ratio == pytest.approx(1 / 0.6, abs=1)
    harmful = made(world)
    generator = np.random.default_rng(0)
    for n in range(200):
        choice = Choice(n % 80, "uniform" if n % 5 == 0 else "mean", "v")
        gain = (1.0 if choice.source == "uniform" else -0.5) + 0.1 * generator.standard_normal((2, 2)) / 4
        harmful.observe(choice, [0.0, 1.0], step=0, group=str(n), influence={"v": np.broadcast_to(gain, (2, 2)) / 2})
    assert harmful.gain()[2] < 1
    counts = [sum(c.source == "uniform" for c in harmful.next(80, 4 * n)) for n in range(1, 6)]
    assert 0.4 < np.mean(counts) / 80 < 0.6
    for n in range(200):  # prompts that are chosen help now
        influence = {"v": np.full((2, 2), 2.0) + 0.1 * generator.standard_normal((2, 2))}
        harmful.observe(Choice(n % 80, "mean", "v"), [0.0, 1.0], step=21, group=f"later {n}", influence=influence)
    assert sum(c.source == "uniform" for c in harmful.next(80, 25)) / 80 < 0.25


def test_the_interval_of_a_ratio_by_hand() -> None:
    # Fieller: 4 / 2 with variances 0.25 and 0: the bounds of 4 +- 1.96 x 0.5, over 2
    assert ratio_interval(4.0, 0.25, 2.0, 0.0) == pytest.approx((2, 1.51, 2.49))
    assert ratio_interval(1.0, 0.1, 0.1, 1.0) == (pytest.approx(10), float("-inf"), float("inf"))


def test_where_nothing_helps_prompts_that_teach_something_are_drawn() -> None:
    """The largest of negative gains is that of a prompt which is always solved."""
    world = World(pool=100)
    curriculum = made(world)
    for n in range(200):
        rewards = [1.0] * 8 if n % 100 < 50 else [0.0, 1.0] * 4
        influence = {"v": np.full((2, 2), -1.0) + 0.1 * world.generator.standard_normal((2, 2))}
        curriculum.observe(Choice(n % 100, "uniform", ""), rewards, step=0, group=str(n), influence=influence)
    found = [c for step in range(1, 5) for c in curriculum.next(8, step) if c.source != "uniform"]
    assert np.mean([c.source == "learnability" for c in found]) > 0.6  # else a draw was above 0
    assert np.mean([c.place < 50 for c in found if c.source == "learnability"]) < 0.4


def test_the_state_of_other_prompts_is_refused() -> None:
    world = World()
    state = made(world).state_dict()
    world.points = world.points[::-1]
    with pytest.raises(ArtifactError, match="other prompts"):
        made(world).load_state_dict(state)


def test_the_state_of_the_same_prompts_is_taken_though_their_points_differ_in_the_last_bit() -> None:
    world, ids = World(), [str(n) for n in range(80)]
    state = made(world, prompt_ids=ids).state_dict()
    world.points = np.nextafter(world.points, np.inf)
    made(world, prompt_ids=ids).load_state_dict(state)
    with pytest.raises(ArtifactError, match="other prompts"):
        made(world, prompt_ids=ids[::-1]).load_state_dict(state)


def test_wrong_labels_stand_out_among_prompts_like_them() -> None:
    """Half of one kind, which is solved often, have wrong answers. The other kind is hard."""
    world = World(pool=200)
    curriculum = made(world)
    wrong = (world.kinds == 0) & (np.arange(200) % 4 == 0)
    for n in range(160):
        rate = 0.03 if wrong[n] else (0.8, 0.2)[world.kinds[n]]
        rewards = (world.generator.random(8) < rate).astype(float)
        for group in range(2):
            curriculum.observe(Choice(n, "uniform", ""), rewards.tolist(), step=group * 90, group=f"{n}/{group}")
    names = [str(n) for n in range(200)]
    found = np.array(curriculum.table(names)["wrong_label"])
    assert found[:160][wrong[:160]].min() > 0.5
    assert np.median(found[:160][wrong[:160]]) > 0.99
    assert found[:160][(world.kinds[:160] == 0) & ~wrong[:160]].max() < 0.5
    assert found[160:][world.kinds[160:] == 0] == pytest.approx(0.5, abs=0.15)  # not drawn: what those like them show
    again = made(world)
    again.load_state_dict(curriculum.state_dict())
    assert again.table(names).equals(curriculum.table(names))
    assert made(world).table(names)["wrong_label"].to_pylist() == pytest.approx([0.2] * 200)


def test_infinite_influence_is_dropped_and_counted() -> None:
    curriculum = made(World())
    bad = {"v": [[float("inf"), 0.0], [0.0, 0.0]]}
    curriculum.observe(Choice(0, "uniform", ""), [0.0, 1.0], step=0, group="a", influence=bad)
    assert curriculum.metrics()["curriculum/dropped"] == 1


def test_several_sets_share_the_places_by_what_is_left_to_learn() -> None:
    world = World()
    own = world.validation["v"]
    world.validation = {"solved": own, "open": own + np.array([4.0, 0.0]), "failing": own + np.array([2.0, 3.0])}
    curriculum = made(world)
    for member in range(10):
        curriculum.observe_validation("solved", member, [1.0] * 8, step=0, influence=[[1, 1], [1, 1]])
        curriculum.observe_validation("open", member, [0.0, 1.0] * 4, step=0, influence=[[1, 1.1], [1, 1]])
        curriculum.observe_validation("failing", member, [0.0] * 8, step=0)
    for n in range(20):
        rewards, halves = world.group(Choice(n, "uniform", ""))
        influence = {"solved": halves["v"], "open": halves["v"][::-1]}
        curriculum.observe(Choice(n, "uniform", ""), rewards, step=0, group=str(n), influence=influence)
    places = [c for step in range(1, 9) for c in curriculum.next(8, step)]
    counts = {name: sum(c.validation_set == name for c in places) for name in world.validation}
    assert counts["failing"] > counts["open"] > 1.5 * counts["solved"]


def test_prompts_that_were_just_trained_give_way_to_others_that_help() -> None:
    world = World(pool=200)
    batches = list(trained(made(world), world, range(60)))
    chosen = [c.place for batch in batches[20:] for c in batch if c.source != "uniform"]
    assert np.mean(world.kinds[chosen] == 0) > 0.9
    assert np.bincount(chosen, minlength=200)[world.kinds == 0].min() > 0  # each of the 100 that help


def test_rounds_cost_the_same_and_come_at_growing_distances() -> None:
    world = World()
    curriculum, rounds = made(world, batch=8), list[int]()
    for step in range(130):
        due = curriculum.validation_due(step)
        if due:
            rounds.append(step)
            assert sum(due["v"]) == 128
    assert rounds == [0, 8, 24, 40, 64, 104]  # whether or not a completion gets a reward


def test_a_round_goes_where_rewards_vary_and_leaves_some_out_if_there_are_too_many() -> None:
    generator = np.random.default_rng(0)
    assert even_counts(np.array([1.0, 1.0, 2.0]), 11, generator) == [6, 6, 10]
    assert even_counts(np.zeros(2), 4, generator) == [4, 4]
    few = even_counts(np.ones(10), 3, generator)
    assert sorted(few) == [0] * 7 + [2] * 3


def test_by_rewards_alone_prompts_that_are_always_solved_are_rarely_drawn() -> None:
    world = World(pool=40)
    curriculum = made(world)
    for place in range(40):
        rewards = [1.0] * 8 if place % 2 else [1.0, 0.0] * 4
        curriculum.observe(Choice(place, "uniform", ""), rewards, step=0, group=str(place))
    curriculum.rewards_only = True
    choices = [choice for step in range(1, 30, 10) for choice in curriculum.next(8, step)]
    assert curriculum.validation_due(30) == {}
    assert np.mean([choice.place % 2 for choice in choices if choice.source != "uniform"]) < 0.4


@pytest.mark.parametrize("scaling", ["group", "none"])
def test_learnability_of_weighted_rewards_is_what_gradients_scale_with(scaling: str) -> None:
    """Against brute force: advantages times scores that follow the rewards, on rewards from -1 to 4.6."""
    generator = np.random.default_rng(0)
    rates = np.array([0.1, 0.5, 0.9, 0.3])

    def sampled(place: int, size: tuple[int, ...]) -> np.ndarray:
        solved, graded = generator.random(size) < rates[place], generator.beta(2, 5, size)
        return 4.0 * solved + 0.6 * graded - (generator.random(size) < 0.05)

    points = 100 * np.eye(4)
    curriculum = Curriculum(points, {"v": points[:1]}, seed=0, scaling=scaling)  # type: ignore[arg-type]
    for n in range(400):
        curriculum.observe(Choice(n % 4, "uniform", ""), sampled(n % 4, (8,)).tolist(), step=0, group=str(n))
    for place in range(4):
        rewards = sampled(place, (20_000, 64))
        advantages = rewards - rewards.mean(axis=1, keepdims=True)
        advantages /= rewards.std(axis=1, ddof=1, keepdims=True) if scaling == "group" else 1.0
        scores = 3.0 * rewards + generator.standard_normal(rewards.shape)  # an influence of 3 per unit of reward
        assert curriculum._learnability()[place] == pytest.approx((advantages * scores).mean() / 3, rel=0.1)


@pytest.mark.parametrize("scaling", ["group", "none"])
def test_graded_rewards_that_never_differ_within_a_group_still_give_a_batch(scaling: str) -> None:
    curriculum = made(World(), scaling=scaling)
    for n, reward in enumerate((0.0, 0.3, 1.0)):
        curriculum.observe(Choice(n, "uniform", ""), [reward] * 8, step=0, group=str(n))
    assert len(curriculum.next(8, 4)) == 8
