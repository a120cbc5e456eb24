"""The scenario suite: every recipe is valid, its pool has the shares it states, and nothing stands in two roles."""

from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest

from cropi.builtin import FAMILIES
from cropi.builtin.families import STYLES
from cropi.config import BuiltinSource, Config
from cropi.config.loading import load_config, suite_names
from cropi.prompts import checked_prompts
from cropi.prompts.leakage import Leakage

NAMES = ["conflict", "homogeneous", "look-alikes", "no-signal", "noisy-labels", "rare-skill", "targeted", "two-sets"]
scenarios = pytest.mark.parametrize("name", NAMES)


@cache
def settings(name: str, seed: int = 100) -> Config:
    return load_config(f"suite/{name}", [f"seed={seed}"])


@cache
def prompts(name: str, seed: int = 100) -> tuple[list[dict], Leakage]:
    return checked_prompts(settings(name, seed))[:2]


def size(name: str, wanted: Callable[[BuiltinSource], bool]) -> int:
    """Prompts of the sources of the pool that are wanted."""
    return sum(len(s.families) * s.count for s in settings(name).prompts.train if wanted(s))


def targets(name: str) -> set[str]:
    """Families of the targeted test sets."""
    tests = settings(name).prompts.test.values()
    return {family for test in tests if test.targeted for s in test.sources for family in s.families}


def test_the_suite_is_complete():
    assert suite_names() == [f"suite/{name}" for name in NAMES]


@scenarios
def test_protocol(name):
    config = settings(name)
    assert config.name == name
    assert config.select.strategy.type == "cropi"
    trainer, steps = config.trainer, config.train.stages * config.train.steps_per_stage
    assert (trainer["per_device_train_batch_size"], trainer["num_generations"], trainer["beta"]) == (64, 8, 0.0)
    assert (trainer["loss_type"], steps, config.evaluate.every, config.policy.cpu_threads) == ("dr_grpo", 96, 8, 1)
    # no source has a seed of its own, so that another run has other prompts
    sources = [*config.prompts.train, *(s for v in config.prompts.validation.values() for s in v)]
    assert all(s.seed is None for s in [*sources, *(s for t in config.prompts.test.values() for s in t.sources)])


@scenarios
def test_sizes_and_that_no_prompt_has_two_roles(name):
    rows, leakage = prompts(name)
    sizes = Counter(row["set"] for row in rows)
    assert 800 <= sizes["train"] <= 1200
    for kind, low, high in (("validation/", 24, 32), ("test/", 96, 192)):
        assert all(low <= n <= high for set_name, n in sizes.items() if set_name.startswith(kind))
    tests = settings(name).prompts.test
    assert any(not test.targeted for test in tests.values())
    assert all(sizes[f"test/{n}"] == 128 for n, test in tests.items() if test.targeted)
    assert not leakage.exact
    assert not leakage.near
    roles = {
        role: {r["messages"] for r in rows if r["set"].startswith(role)} for role in ("train", "validation", "test")
    }
    assert not roles["train"] & roles["validation"]
    assert not roles["train"] & roles["test"]
    assert not roles["validation"] & roles["test"]


@scenarios
def test_validation_stands_for_the_targets_and_is_right(name):
    config = settings(name)
    validation = [s for sources in config.prompts.validation.values() for s in sources]
    assert {family for s in validation for family in s.families} == targets(name)
    assert all(s.label_noise == 0 and s.label_rule == "right" for s in validation)


@scenarios
def test_the_untargeted_set_has_a_family_of_every_style(name):
    tests = settings(name).prompts.test.values()
    (families,) = [s.families for test in tests if not test.targeted for s in test.sources]
    assert sorted(STYLES[family] for family in families) == sorted(set(STYLES.values()))
    assert not targets(name) & set(families)


@scenarios
def test_another_seed_has_other_prompts_in_every_role(name):
    sets = sorted({row["set"] for row in prompts(name)[0]})
    for set_name in sets:
        first, second = (
            {r["prompt_id"] for r in prompts(name, seed)[0] if r["set"] == set_name} for seed in (100, 101)
        )
        assert len(first - second) > len(first) / 2


def test_targeted_has_two_families_among_ten_or_more():
    assert len(targets("targeted")) == 2
    families = {family for s in settings("targeted").prompts.train for family in s.families}
    assert len(families) >= 10


def test_half_of_the_noisy_labels_are_wrong():
    config = settings("noisy-labels")
    assert {s.label_noise for s in config.prompts.train} == {0.5}
    assert set(config.prompts.train[0].families) == set(FAMILIES)


def test_no_signal_has_solved_impossible_and_later_solvable_prompts():
    solved = size("no-signal", lambda s: s.hint == 1)
    impossible = size("no-signal", lambda s: (s.min_length or 0) > 10)
    later = size("no-signal", lambda s: s.families == ("reverse",) and (s.max_length or 99) < 10)
    # of the last, two thirds have no right answer in 8 samples: 0.7 of the pool is without signal
    assert (solved, impossible, later, size("no-signal", lambda s: True)) == (448, 202, 150, 1000)
    assert "reverse" in targets("no-signal")


def test_the_habit_is_in_families_of_the_targets_styles():
    habit = [s for s in settings("conflict").prompts.train if s.label_rule == "stop_early"]
    families = {family for s in habit for family in s.families}
    assert {STYLES[family] for family in families} == {STYLES[family] for family in targets("conflict")}
    assert not families & targets("conflict")


def test_look_alikes_are_wrong_and_what_is_of_use_looks_otherwise():
    wrong, useful, _ = settings("look-alikes").prompts.train
    assert set(wrong.families) == targets("look-alikes")
    assert (wrong.label_rule, useful.label_rule) == ("stop_early", "right")
    assert {STYLES[family] for family in useful.families} == {STYLES[family] for family in targets("look-alikes")}
    assert not set(useful.families) & targets("look-alikes")


def test_the_rare_skill_is_three_percent_and_alone_in_its_style():
    (target,) = targets("rare-skill")
    sources = Counter(row["source"] for row in prompts("rare-skill")[0] if row["set"] == "train")
    assert sources[target] / sources.total() == 0.03
    assert [family for family in sources if STYLES[family] == STYLES[target]] == [target]


def test_the_homogeneous_pool_is_one_family_at_one_length():
    (source,) = settings("homogeneous").prompts.train
    assert len(source.families) == 1
    assert source.min_length == source.max_length is not None


def test_the_two_sets_have_no_style_in_common():
    first, second = targets("two-sets")
    assert STYLES[first] != STYLES[second]
    assert len(settings("two-sets").prompts.validation) == 2
