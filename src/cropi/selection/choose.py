"""From a ranking to a selection: the top of it, under quotas and with an exploration share. Columns, not rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from math import floor

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from cropi.artifacts import SELECTION
from cropi.config import SelectConfig
from cropi.errors import SignalError
from cropi.functional.fusion import ranks
from cropi.functional.sampling import places
from cropi.seeds import unit_interval
from cropi.selection.candidates import Candidates, Ranking

BLOCK = 1 << 18  # rows of the table that are built at once


@dataclass(frozen=True)
class Choice:
    """All prompts, best first, and which of them are chosen."""

    rows_N: Int[np.ndarray, " N"]  # of the candidates
    ranks_N: Int[np.ndarray, " N"]  # of the candidates, in their order; 0 where the strategy could not rank one
    reasons: Mapping[int, str]  # by row of the candidates, for the chosen ones, best first

    def __len__(self) -> int:
        return len(self.rows_N)


def choose(candidates: Candidates, ranking: Ranking, config: SelectConfig, size: int) -> Choice:
    """The top `size` under quotas and the exploration share.

    Ties break by prompt id. ceil(exploration x size) places go to prompts drawn at random among those that the strategy
    did not choose, those without signal included, so that nothing is excluded for ever. A quota caps a source's places
    at floor(quota x size), and at no less than one.
    """
    eligible = np.flatnonzero(ranking.eligible_N)
    ranks_N = np.zeros(len(candidates), dtype=np.int64)
    ranks_N[eligible] = ranks(ranking.scores_N[eligible])
    best_first = np.empty_like(eligible)
    best_first[ranks_N[eligible] - 1] = eligible
    quotas = _Quotas(candidates, config.quotas, size)
    explored = places(config.exploration, size)
    chosen = quotas.take(best_first, size - explored)
    extra = chosen[:0]
    if explored:
        left_N = candidates.usable_N.copy()
        left_N[chosen] = False
        ids, salt = candidates.prompt_ids, (candidates.seed, "explore", candidates.stage)
        drawn = sorted(np.flatnonzero(left_N).tolist(), key=lambda row: (unit_interval(*salt, ids[row]), row))
        extra = quotas.take(np.array(drawn, dtype=np.int64), explored)
    if not len(chosen) and not len(extra):
        raise SignalError(
            f"the selection of stage {candidates.stage} is empty: none of the {len(candidates)} prompts qualifies",
            where="select.strategy",
            fix="widen the strategy's band, raise collect.num_generations, or set select.exploration above 0.",
        )
    reasons = {row: _reason(ranking, row, int(ranks_N[row])) for row in chosen.tolist()}
    rest = np.flatnonzero(~ranking.eligible_N)
    return Choice(np.concatenate([best_first, rest]), ranks_N, reasons | dict.fromkeys(extra.tolist(), "exploration"))


class _Quotas:
    """What is left of every source's places."""

    def __init__(self, candidates: Candidates, quotas: Mapping[str, float], size: int) -> None:
        self._room = {name: max(1, floor(Decimal(repr(share)) * size)) for name, share in quotas.items()}
        sources = np.array(candidates.sources, dtype=object) if quotas else np.empty(0, dtype=object)
        self._of: dict[str, Bool[np.ndarray, " N"]] = {name: sources == name for name in quotas}

    def take(self, queue: Int[np.ndarray, " M"], count: int) -> Int[np.ndarray, " T"]:
        """The first `count` rows of a queue whose source has room left."""
        kept = np.ones(len(queue), dtype=bool)
        for name, among_N in self._of.items():
            kept[np.flatnonzero(among_N[queue])[self._room[name] :]] = False
        taken = queue[kept][:count]
        for name, among_N in self._of.items():
            self._room[name] -= int(among_N[taken].sum())
        return taken


def _reason(ranking: Ranking, row: int, order: int) -> str:
    by_set = ", ".join(f"{name} #{ranks_N[row]}" for name, ranks_N in sorted(ranking.set_ranks.items()))
    return f"{ranking.reason}: #{order}" + (f" ({by_set})" if by_set else "")


def selection_batches(candidates: Candidates, ranking: Ranking, choice: Choice) -> Iterator[pa.RecordBatch]:
    """The selection table, best first, in blocks."""
    for start in range(0, len(choice), BLOCK):
        yield _block(candidates, ranking, choice, choice.rows_N[start : start + BLOCK])


def selection_table(candidates: Candidates, ranking: Ranking, choice: Choice) -> pa.Table:
    """The whole of it."""
    return pa.Table.from_batches(selection_batches(candidates, ranking, choice), schema=SELECTION)


def _block(candidates: Candidates, ranking: Ranking, choice: Choice, rows_B: Int[np.ndarray, " B"]) -> pa.RecordBatch:
    rows = rows_B.tolist()
    ranks_B, rates_B = choice.ranks_N[rows_B], candidates.pass_rates_N[rows_B]
    reasons = [choice.reasons.get(row) for row in rows]
    names = sorted(candidates.influence)
    items_BV = np.stack([candidates.influence[name][rows_B] for name in names], axis=1) if names else np.empty((0, 0))
    offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * len(names))
    keys = pa.DictionaryArray.from_arrays(
        np.tile(np.arange(len(names), dtype=np.int32), len(rows)), pa.array(names, pa.string())
    ).dictionary_decode()
    columns = [
        pa.array([candidates.prompt_ids[row] for row in rows], pa.string()),
        pa.array([candidates.sources[row] for row in rows], pa.string()),
        pa.array([reason is not None for reason in reasons]),
        pa.array(ranks_B, pa.int32(), mask=ranks_B == 0),
        pa.array(ranking.scores_N[rows_B], pa.float64()),
        pa.MapArray.from_arrays(offsets, keys, pa.array(items_BV.ravel(), pa.float64())),
        pa.array(rates_B, pa.float64(), mask=np.isnan(rates_B)),
        pa.array([candidates.statuses[row] for row in rows], pa.string()),
        pa.array(reasons, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SELECTION)
