"""A small pool for tests of strategies."""

import dataclasses

import numpy as np

from cropi.config import SelectConfig, Strategy
from cropi.curriculum.candidates import Candidates
from cropi.curriculum.choose import choose, selection_table
from cropi.stages.select import rank


def pool(pass_rates: list[float], size: int = 8, **facts: object) -> Candidates:
    """Prompts a, b, … of one source with these pass rates of K = `size` verdicts; NaN: the answer cannot be read."""
    p_N = np.array(pass_rates)
    statuses = ["gold_unparseable" if np.isnan(p) else "ok" if 0 < p < 1 else "no_signal" for p in p_N]
    ids = [f"{chr(97 + n // 26)}{chr(97 + n % 26)}" if len(p_N) > 26 else chr(97 + n) for n in range(len(p_N))]
    plain = Candidates(ids, ["x"] * len(ids), statuses, p_N, p_N * (1 - p_N), {}, {}, 0, 0)
    sizes_N = np.where(np.isnan(p_N), 0, size)
    return dataclasses.replace(plain, **({"group_sizes_N": sizes_N} | facts))


def chosen(strategy: Strategy, size: int, candidates: Candidates, **settings: object) -> list[str]:
    """Ids of the selection, best first."""
    config = SelectConfig(strategy=strategy, fraction=size / len(candidates), **settings)
    ranking = rank(candidates, strategy, config)
    rows = selection_table(candidates, ranking, choose(candidates, ranking, config, size)).to_pylist()
    assert sorted(row["prompt_id"] for row in rows) == sorted(candidates.prompt_ids)  # nothing vanishes
    return [row["prompt_id"] for row in rows if row["selected"]]


def scores(strategy: Strategy, candidates: Candidates, **settings: object) -> np.ndarray:
    """What the strategy gives every prompt."""
    return rank(candidates, strategy, SelectConfig(strategy=strategy, **settings)).scores_N
