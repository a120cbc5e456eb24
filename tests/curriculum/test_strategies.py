"""The strategies as a whole: their page, their presets, what they are charged for."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

import cropi
from cropi.config import Config
from cropi.config.loading import load_config, merged, presets
from cropi.curriculum.strategies import (
    STRATEGIES,
    BmcStrategy,
    SimilarityLearnabilityStrategy,
    SimilarityStrategy,
    StrategyTable,
)
from cropi.functional.projection import SparseProjection, projection_of

PAGE = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text(encoding="utf-8")
LETTERS = {"trajectories": "T", "gradients": "G", "validation": "V", "rewards": "R", "representations": "H"}
# What a strategy reads under some of its settings.
OPTIONAL = {SimilarityStrategy: {"T"}, SimilarityLearnabilityStrategy: {"H"}, BmcStrategy: {"V"}}


def of_type(strategy: type[StrategyTable]) -> str:
    (name,) = get_args(strategy.model_fields["type"].annotation)
    return str(name)


def with_preset(name: str) -> Config:
    values: dict[str, Any] = load_config("quickstart", ["select.strategy=full"]).resolved()
    return Config(**merged(values, presets()[name]["config"]))


ADDED = '''"""The shortest prompts."""

from typing import ClassVar, Literal

import numpy as np

from cropi.curriculum.strategy import Candidates, FusionConfig, Ranking, StrategyTable


class ShortestStrategy(StrategyTable):
    """The shortest prompts."""

    reads_texts: ClassVar[bool] = True

    type: Literal["shortest"]
    """Selects this strategy."""
    longest: int = 1000
    """Characters of the longest prompt that may be selected."""

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        lengths_N = np.array([len(text) for text in candidates.texts])
        return Ranking(-lengths_N.astype(float), lengths_N <= self.longest, "short")
'''
USED = """
from cropi.curriculum.strategy import Candidates, FusionConfig
from cropi.functional.projection import SparseProjection, projection_of
from cropi.config.loading import load_config
import numpy as np

strategy = load_config("quickstart", ["select.strategy={type: shortest, longest: 3}"]).select.strategy
rates_N = np.full(2, 0.5)
pool = Candidates(["a", "b"], ["", ""], ["ok", "ok"], rates_N, rates_N / 2, {}, {}, 0, 0, texts=["long text", "two"])
ranking = strategy.rank(pool, 1, FusionConfig())
print(strategy.longest, ranking.scores_N.tolist(), ranking.eligible_N.tolist())
"""


def test_adding_a_strategy_takes_one_file_and_one_line(tmp_path: Path) -> None:
    shutil.copytree(Path(cropi.__file__).parent, tmp_path / "cropi", ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "cropi" / "curriculum" / "strategies"
    (folder / "shortest.py").write_text(ADDED, encoding="utf-8")
    with (folder / "__init__.py").open("r+", encoding="utf-8") as package:
        text = package.read()
        package.seek(0)
        line = "from cropi.curriculum.strategies.shortest import ShortestStrategy as ShortestStrategy\n"
        last = "from cropi.curriculum.strategies.vcrl"
        package.write(text.replace(last, line + last))
    command = [sys.executable, "-c", USED]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert done.stdout.decode().strip() == "3 [-9.0, -3.0] [False, True]", done.stderr.decode()


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_is_a_valid_patch(name: str) -> None:
    assert set(presets()[name]) == {"about", "config"}
    assert with_preset(name).select.strategy.type
    assert re.search(rf"`{name}`", PAGE), "docs/strategies.md leaves it out"


@pytest.mark.parametrize("strategy", sorted(STRATEGIES, key=of_type), ids=of_type)
def test_the_page_says_what_is_read(strategy: type[StrategyTable]) -> None:
    table = PAGE.split("## Presets")[0]
    (row,) = re.findall(rf"^\| `{of_type(strategy)}` \|([^|]*)\|", table, re.MULTILINE)
    letters = set(re.findall(r"\b[TGVRH]\b", row))
    assert letters == {LETTERS[need] for need in strategy.needs} | OPTIONAL.get(strategy, set())


def test_who_collects() -> None:
    free = {name for name in presets() if not with_preset(name).select.strategy.collects}
    online = {name for name in free if with_preset(name).select.strategy.chooses_online}
    assert free - online == {"full", "random", "random-redrawn", "dapo", "similarity"}
    by_rewards = {"mopps", "bots", "thompson", "thompson-dapo", "lze", "similarity-learnability-words"}
    assert online == by_rewards | {"bmc", "bmc-t", "similarity-learnability-hidden", "cropi"}
    assert {name for name in online if not with_preset(name).select.strategy.reads_representations} == by_rewards
    assert {name for name in online if with_preset(name).select.strategy.reads_influence} == {"cropi"}


def test_who_trains_on_all_that_it_keeps() -> None:
    online = {of_type(strategy) for strategy in STRATEGIES if strategy.chooses_online}
    assert {of_type(strategy) for strategy in STRATEGIES if strategy.takes_all} == {"full"} | online


def test_the_paper_is_set_in_full() -> None:
    score = with_preset("cropi-paper").score
    assert (score.score, score.normalizer, score.advantage_std) == ("cosine", "sequence", True)
    assert projection_of(score.mask) == SparseProjection(32768, 0.1, mask="uniform")
    select = with_preset("cropi-paper").select
    assert (select.fraction, select.fusion.kappa, select.fusion.truncate) == (0.1, 0, True)
