"""A small pool for tests of strategies."""

import dataclasses

import numpy as np

from cropi.curriculum.strategies import Strategy
from cropi.curriculum.strategy import Candidates, FusionConfig
from cropi.stages.select import choose, selection_batches

FUSION = FusionConfig()


def pool(pass_rates: list[float], size: int = 8, **facts: object) -> Candidates:
    """Prompts a, b, … of one source with these pass rates of K = `size` verdicts; NaN: the answer cannot be read."""
    p_N = np.array(pass_rates)
    statuses = ["gold_unparseable" if np.isnan(p) else "ok" if 0 < p < 1 else "no_signal" for p in p_N]
    ids = [f"{chr(97 + n // 26)}{chr(97 + n % 26)}" if len(p_N) > 26 else chr(97 + n) for n in range(len(p_N))]
    plain = Candidates(ids, ["x"] * len(ids), statuses, p_N, p_N * (1 - p_N), {}, {}, 0, 0)
    sizes_N = np.where(np.isnan(p_N), 0, size)
    return dataclasses.replace(plain, **({"group_sizes_N": sizes_N} | facts))


def chosen(strategy: Strategy, size: int, candidates: Candidates, fusion: FusionConfig = FUSION) -> list[str]:
    """Ids of the selection, best first."""
    ranking = strategy.rank(candidates, size, fusion)
    batches = selection_batches(candidates, ranking, choose(candidates, ranking, size))
    rows = [row for batch in batches for row in batch.to_pylist()]
    assert sorted(row["prompt_id"] for row in rows) == sorted(candidates.prompt_ids)  # nothing vanishes
    return [row["prompt_id"] for row in rows if row["selected"]]


def scores(strategy: Strategy, candidates: Candidates) -> np.ndarray:
    """Scores of all candidates for a selection of a tenth."""
    return strategy.rank(candidates, -(-len(candidates) // 10), FUSION).scores_N
