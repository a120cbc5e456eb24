"""Drawn scenarios: the same in any process, as various as stated, and rejected by the stated rule."""

import hashlib
import json
from collections import Counter
from functools import cache

import pytest

from cropi.builtin.families import STYLES, difficulty
from cropi.config import Config
from cropi.config.loading import config_of
from cropi.lab.compare import run_comparison
from cropi.lab.compare.compare_options import CompareOptions
from cropi.lab.compare.comparison_plan import make_plan
from cropi.lab.compare.drawn import accepted, draw, drawn_scenario, rejection, seed_of
from cropi.prompts import checked_prompts

SEEDS = range(0, 200, 8)
POPULATION_HASH = "483b27e1846a090a"  # of a thousand scenarios, as they were when the population was fixed


@cache
def config(seed: int) -> Config:

    return config_of(drawn_scenario(seed), f"drawn-{seed}")


def shares(seed: int) -> Counter:
    """Share of the pool by what its prompts are."""
    made, found = draw(seed), Counter()
    for source in config(seed).prompts.train:
        (family,) = source.families
        kind = "look-alikes" if source.label_rule == "stop_early" else "solved" if source.hint else "relevant"
        if source.max_length == 12 and family != "parity":
            kind = "impossible"
        elif kind == "relevant" and family not in (*made.wanted_families, *made.kin):
            kind = "others"
        found[kind] += source.count
    return Counter({kind: count / found.total() for kind, count in found.items()})


def test_the_same_seed_gives_the_same_scenario_in_any_process():
    text = json.dumps([drawn_scenario(seed) for seed in range(1000)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == POPULATION_HASH


@pytest.mark.parametrize("seed", SEEDS)
def test_a_config_has_the_shares_of_its_draw_and_right_validation_sets(seed: int):
    made, own, found = draw(seed), config(seed), shares(seed)
    tests = own.prompts.test.values()
    assert (own.name, own.train.stages * own.train.steps_per_stage) == (f"drawn-{seed}", 96)
    assert found["relevant"] == pytest.approx(made.relevant, abs=0.012)  # whole prompts of up to 6 families
    assert found["look-alikes"] == pytest.approx(made.look_alikes, abs=0.012)
    assert found["others"] >= 0.08
    validation = [source for sources in own.prompts.validation.values() for source in sources]
    assert all(s.label_noise == 0 and s.label_rule == "right" for s in validation)
    assert {f for s in validation for f in s.families} == {
        f for test in tests if test.targeted for s in test.sources for f in s.families
    }
    assert not {STYLES[family] for family in made.others} & set(made.wanted)


def test_of_two_levels_the_long_one_is_wanted_and_both_are_practised():
    made, own = draw(959), config(959)
    assert made.two_levels
    assert made.wanted_families[0] == "horner"  # 4 to 7 items by default
    assert {(s.min_length, s.max_length) for s in own.prompts.validation["steps"] if s.families == ("horner",)} == {
        (8, 9)
    }
    levels = Counter()
    for source in own.prompts.train:
        if source.families[0] in made.kin and not source.hint and source.min_length < 12:
            usual = difficulty(source.families[0]).max_length
            levels["short" if source.max_length <= usual else "long"] += source.count
    assert levels["short"] == levels["long"] == pytest.approx(made.relevant * made.pool / 2, abs=3)


@pytest.mark.parametrize("seed", [0, 900, 959])
def test_prompts_can_be_made_and_stand_in_one_role(seed: int):
    found = checked_prompts(config(seed))
    assert not found.leakage.exact
    assert sum(row["set"] == "train" for row in found.rows) == pytest.approx(draw(seed).pool, abs=20)


@pytest.mark.parametrize(
    ("seed", "checked", "reason"),
    [
        (900, {"a": [0.3, 0.54]}, "nothing in reach"), (900, {"a": [0.3, 0.56]}, None),
        (900, {"a": [0.71, 0.99]}, "solved already"), (900, {"a": [0.69, 0.95]}, None),
        (900, {"a": [0.9, 1.0], "b": [0.1, 0.6]}, None),  # one to keep, one to learn: half and half
        (900, {"a": [0.3, 0.6], "b": [0.3, 0.4]}, "nothing in reach"),
        (933, {"a": [0.3, 0.9]}, "too few to practise"),  # 13 prompts
        (940, {"a": [0.3, 0.9]}, "too few to practise"),  # 15
        (954, {"a": [0.3, 0.9]}, None),  # 20
    ],
)  # fmt: skip
def test_the_rule(seed, checked, reason):
    assert rejection(draw(seed), checked) == reason


def test_the_first_accepted_draws_are_taken():
    assert list(accepted(2, 904, lambda seed: {"a": [0.3, 0.3 + seed % 2]})) == [905, 907]


def test_names():
    assert (seed_of("drawn-12"), seed_of("drawn-"), seed_of("drawn"), seed_of("drawn-x")) == (12, None, None, None)


def test_drawn_stands_for_the_accepted_scenarios_and_the_policy_is_asked_once(tmp_path, monkeypatch):
    asked = []

    def check(seed):
        asked.append(seed)
        return {"a": [0.3, 0.3 + seed % 2]}

    monkeypatch.setattr(run_comparison, "base_policy_check", lambda: check)
    options = CompareOptions(["drawn", "seed=0"], scenarios=2, folder=tmp_path)
    names = run_comparison._with_drawn(options)
    assert names == run_comparison._with_drawn(options) == ["drawn-1", "drawn-3"]
    assert asked == [0, 1, 2, 3]
    plan = make_plan(names, ["train.stages=3"], ["full", "random"], [0], tmp_path)
    assert [(run.scenario, run.strategy) for run in plan.wanted] == [
        (name, strategy) for name in names for strategy in ("full", "random")
    ]
    assert plan.wanted[0].config.train.stages == 3
