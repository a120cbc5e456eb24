"""The strategies as a whole: their page, their presets, what they are charged for."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from cropi import config as tables
from cropi.config import Config, StrategyTable
from cropi.loading import load_config
from cropi.presets import merged, presets
from cropi.stages.select import RANKINGS

PAGE = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text(encoding="utf-8")
LETTERS = {"trajectories": "T", "gradients": "G", "validation": "V", "rewards": "R"}


def of_type(strategy: type[StrategyTable]) -> str:
    (name,) = get_args(strategy.model_fields["type"].annotation)
    return str(name)


def with_preset(name: str) -> Config:
    values: dict[str, Any] = load_config("quickstart", []).resolved()
    return Config(**merged(values, presets()[name]["config"]))


def test_every_strategy_has_a_ranking() -> None:
    (union, _) = get_args(tables.Strategy)
    assert set(RANKINGS) == set(get_args(union))


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_is_a_valid_patch(name: str) -> None:
    assert set(presets()[name]) == {"about", "config"}
    assert with_preset(name).select.strategy.type
    assert re.search(rf"`{name}`", PAGE), "docs/strategies.md leaves it out"


@pytest.mark.parametrize("strategy", sorted(RANKINGS, key=of_type), ids=of_type)
def test_the_page_says_what_is_read(strategy: type[StrategyTable]) -> None:
    table = PAGE.split("## Presets")[0]
    (row,) = re.findall(rf"^\| `{of_type(strategy)}` \|([^|]*)\|", table, re.MULTILINE)
    letters = set(re.findall(r"\b[TGVR]\b", row))
    optional = {"T"} if strategy is tables.SimilarityStrategy else set()
    assert letters == {LETTERS[need] for need in strategy.needs} | optional


def test_who_is_charged_for_collection() -> None:
    free = {name for name in presets() if not with_preset(name).select.strategy.reads_trajectories}
    assert free == {"full", "random", "random-redrawn", "dapo", "greso", "mopps", "similarity"}


def test_who_trains_on_all_that_it_keeps() -> None:
    assert {of_type(strategy) for strategy in RANKINGS if strategy.takes_all} == {"full", "greso"}


def test_fresh_trajectories_go_to_those_that_have_use_for_them() -> None:
    for name in ("gradalign", "acc-greedy"):
        config = with_preset(name)
        assert config.refresh.fraction == 1
        assert config.select.strategy.follows_trajectories


def test_the_paper_is_set_in_full() -> None:
    score = with_preset("cropi-paper").score
    assert (score.score, score.normalizer, score.advantage_std) == ("cosine", "sequence", True)
    assert (score.projection.mask, score.projection.keep_fraction, score.projection.dim) == ("uniform", 0.1, 32768)
    select = with_preset("cropi-paper").select
    assert (select.fraction, select.fusion.kappa, select.fusion.truncate) == (0.1, 0, True)
