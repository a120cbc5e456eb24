"""The scenario suite: every recipe is valid, its pool has the shares it states, and nothing stands in two roles."""

from collections import Counter
from functools import cache

import pytest

from cropi.builtin.families import STYLES
from cropi.config import Config
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


def targets(name: str) -> set[str]:
    """Families of the targeted test sets."""
    tests = settings(name).prompts.test.values()
    return {family for test in tests if test.targeted for s in test.sources for family in s.families}


def test_the_suite_is_complete():
    assert suite_names() == [f"suite/{name}" for name in NAMES]


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
