"""From a ranking to the prompts of a stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from cropi.artifacts import SELECTION
from cropi.curriculum.strategy import Candidates, Ranking
from cropi.errors import SignalError
from cropi.functional.ranking import ranks

BLOCK = 1 << 18  # rows of the table that are built at a time


@dataclass(frozen=True)
class Choice:
    """All prompts, best first, and which of them are chosen."""

    rows_N: Int[np.ndarray, " N"]  # of the candidates
    ranks_N: Int[np.ndarray, " N"]  # of the candidates, in their order; 0 for an ineligible one
    reasons: Mapping[int, str]  # by row of the candidates, for the chosen ones, best first

    def __len__(self) -> int:
        return len(self.rows_N)


def choose(candidates: Candidates, ranking: Ranking, size: int) -> Choice:
    """Choose the best `size` prompts. Ties break by prompt id."""
    eligible = np.flatnonzero(ranking.eligible_N)
    ranks_N = np.zeros(len(candidates), dtype=np.int64)
    ranks_N[eligible] = ranks(ranking.scores_N[eligible])
    best_first = np.empty_like(eligible)
    best_first[ranks_N[eligible] - 1] = eligible
    chosen = best_first[:size]
    if not len(chosen):
        raise SignalError(
            f"the selection of stage {candidates.stage} is empty: none of the {len(candidates)} prompts qualifies",
            where="select.strategy",
            fix="widen the strategy's band, or raise collect.num_generations.",
        )
    rest = np.flatnonzero(~ranking.eligible_N)
    return Choice(np.concatenate([best_first, rest]), ranks_N, _reasons(ranking, chosen, ranks_N))


def _reasons(ranking: Ranking, chosen: Int[np.ndarray, " T"], ranks_N: Int[np.ndarray, " N"]) -> dict[int, str]:
    """By row, in the order chosen: the strategy's reason, the rank, and the rank in every validation set."""
    texts = [f"{ranking.reason}: #{order}" for order in ranks_N[chosen].tolist()]
    if names := sorted(ranking.set_ranks):
        columns = [[f"{name} #{rank}" for rank in ranking.set_ranks[name][chosen].tolist()] for name in names]
        texts = [f"{text} ({', '.join(sets)})" for text, *sets in zip(texts, *columns, strict=True)]
    return dict(zip(chosen.tolist(), texts, strict=True))


def selection_batches(candidates: Candidates, ranking: Ranking, choice: Choice) -> Iterator[pa.RecordBatch]:
    """The selection table, best first, in blocks."""
    # Picking rows out of order is several times as fast from Arrow columns as from lists of strings.
    texts = [pa.array(each, pa.string()) for each in (candidates.prompt_ids, candidates.sources, candidates.statuses)]
    chosen_N = np.zeros(len(candidates), dtype=bool)
    chosen_N[np.fromiter(choice.reasons, dtype=np.int64, count=len(choice.reasons))] = True
    for start in range(0, len(choice), BLOCK):
        rows_B = choice.rows_N[start : start + BLOCK]
        picked = [text.take(pa.array(rows_B)) for text in texts]
        yield _block(candidates, ranking, choice, rows_B, chosen_N[rows_B], picked)


def selection_table(candidates: Candidates, ranking: Ranking, choice: Choice) -> pa.Table:
    """The whole selection table."""
    return pa.Table.from_batches(selection_batches(candidates, ranking, choice), schema=SELECTION)


def _block(
    candidates: Candidates,
    ranking: Ranking,
    choice: Choice,
    rows_B: Int[np.ndarray, " B"],
    chosen_B: Bool[np.ndarray, " B"],
    texts: Sequence[pa.Array],
) -> pa.RecordBatch:
    prompt_ids, sources, statuses = texts
    ranks_B, rates_B = choice.ranks_N[rows_B], candidates.pass_rates_N[rows_B]
    flags = zip(rows_B.tolist(), chosen_B.tolist(), strict=True)
    reasons = [choice.reasons[row] if chosen else None for row, chosen in flags]
    names = sorted(candidates.influence)
    items_BV = np.stack([candidates.influence[name][rows_B] for name in names], axis=1) if names else np.empty((0, 0))
    offsets = pa.array(np.arange(len(rows_B) + 1, dtype=np.int32) * len(names))
    keys = pa.DictionaryArray.from_arrays(
        np.tile(np.arange(len(names), dtype=np.int32), len(rows_B)), pa.array(names, pa.string())
    ).dictionary_decode()
    columns = [
        prompt_ids,
        sources,
        pa.array(chosen_B),
        pa.array(ranks_B, pa.int32(), mask=ranks_B == 0),
        pa.array(ranking.scores_N[rows_B], pa.float64()),
        pa.MapArray.from_arrays(offsets, keys, pa.array(items_BV.ravel(), pa.float64())),
        pa.array(rates_B, pa.float64(), mask=np.isnan(rates_B)),
        statuses,
        pa.array(reasons, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SELECTION)
