"""Selections of the strategies of a comparison, read from run folders: sources, and similarity to validation sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from cropi.artifacts import PROMPTS, is_finished, open_artifact, read_table
from cropi.functional.tfidf import tfidf_similarity
from cropi.lab.compare.paired_runs import Comparison
from cropi.prompt_text import prompt_text, words
from cropi.report.reading import read_selection
from cropi.report.shares import MAX_SOURCES
from cropi.run_folder import StagePaths

VALIDATION = "validation/"


@dataclass(frozen=True)
class Pool:
    """The training prompts of a scenario and seed, by id, and the validation sets' texts."""

    texts: Mapping[str, str]
    sources: Mapping[str, str]
    validation: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Chosen:
    """The selections of a scenario: by seed the pool, by strategy and seed the selected ids of every stage."""

    pools: Mapping[int, Pool]
    stages: Mapping[str, Mapping[int, Sequence[frozenset[str]]]]

    @property
    def choosing(self) -> list[str]:
        """Strategies that did not take the whole pool."""
        return [
            name
            for name, by_seed in self.stages.items()
            if any(len(taken) < len(self.pools[seed].texts) for seed, stages in by_seed.items() for taken in stages)
        ]


def read_chosen(comparison: Comparison, scenario: str) -> Chosen:
    """Read the selections of a scenario's runs; empty if their folders are not here."""
    pools: dict[int, Pool] = {}
    stages: dict[str, dict[int, Sequence[frozenset[str]]]] = {}
    for strategy in comparison.strategies:
        for seed in comparison.seeds(scenario, strategy):
            folder = comparison.run(scenario, seed, strategy)
            taken = _selections(folder) if folder else []
            if folder and taken and (seed in pools or is_finished(folder / "prompts")):
                pools.setdefault(seed, _pool(folder) if seed not in pools else pools[seed])
                stages.setdefault(strategy, {})[seed] = taken
    return Chosen(pools, stages)


def _selections(folder: Path) -> list[frozenset[str]]:
    paths, found = StagePaths(folder), list[frozenset[str]]()
    while (selection := read_selection(paths, len(found))) is not None:
        found.append(selection.chosen)
    return found


def _pool(folder: Path) -> Pool:
    open_artifact(folder / "prompts", "prompts", made_by="cropi compare")
    columns = ("prompt_id", "set", "source", "messages")
    table = read_table(folder / "prompts" / "prompts.parquet", PROMPTS).select(columns)
    texts: dict[str, str] = {}
    sources: dict[str, str] = {}
    validation: dict[str, list[str]] = {}
    for prompt_id, name, source, messages in zip(*(table.column(c).to_pylist() for c in columns), strict=True):
        if name == "train":
            texts[prompt_id], sources[prompt_id] = prompt_text(messages), source
        elif name.startswith(VALIDATION):
            validation.setdefault(name.removeprefix(VALIDATION), []).append(prompt_text(messages))
    return Pool(texts, sources, validation)


# -- sources -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceShares:
    """Mean shares over seeds: of the pool, and by strategy (sources, stages). The last row may be all other sources."""

    sources: Sequence[str]
    pool: Float[np.ndarray, " B"]
    strategies: Mapping[str, Float[np.ndarray, "B G"]]


def source_shares(chosen: Chosen) -> SourceShares:
    """Shares by source; small sources of a long list count together."""
    every = sorted({source for pool in chosen.pools.values() for source in pool.sources.values()})
    place = {source: number for number, source in enumerate(every)}

    def shares(pool: Pool, ids: Sequence[str]) -> np.ndarray:
        counts = Counter(pool.sources[i] for i in ids)
        values_B = np.zeros(len(every))
        for source, count in counts.items():
            values_B[place[source]] = count / len(ids)
        return values_B

    pool_B = np.mean([shares(pool, list(pool.sources)) for pool in chosen.pools.values()], axis=0)
    found = {}
    for name in chosen.choosing:
        stages = min(len(taken) for taken in chosen.stages[name].values())
        by_seed = [
            [shares(chosen.pools[seed], sorted(ids)) for ids in taken[:stages]]
            for seed, taken in chosen.stages[name].items()
        ]
        found[name] = np.mean(by_seed, axis=0).T
    return _largest(every, pool_B, found)


def _largest(every: Sequence[str], pool_B: np.ndarray, found: Mapping[str, np.ndarray]) -> SourceShares:
    peak_B = np.max([pool_B, *(values.max(axis=1) for values in found.values())], axis=0)
    order = sorted(range(len(every)), key=lambda n: (-peak_B[n], every[n]))
    many = len(every) > MAX_SOURCES
    kept = sorted(order[: MAX_SOURCES - 1] if many else order, key=lambda n: (-pool_B[n], every[n]))
    rest = [n for n in order if n not in kept]
    names = [every[n] for n in kept] + ([f"{len(rest)} other sources"] if many else [])

    def rows(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values[kept], values[rest].sum(axis=0, keepdims=True)]) if many else values[kept]

    return SourceShares(names, rows(pool_B), {name: rows(values) for name, values in found.items()})


# -- similarity --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Similarity:
    """Mean similarity to one validation set: of the pool by seed, of what strategies selected by seed and stage."""

    validation_set: str
    pool: Float[np.ndarray, " S"]
    strategies: Mapping[str, Float[np.ndarray, "S G"]]


def similarities(chosen: Chosen) -> list[Similarity]:
    """Mean TF-IDF cosine with the prompts of each validation set: of the selected prompts, and of the whole pool."""
    values = {seed: _similarity(pool) for seed, pool in chosen.pools.items()}
    names = list(dict.fromkeys(name for by_set in values.values() for name in by_set))
    found = []
    for name in names:
        of_strategies = {}
        for strategy in chosen.choosing:
            by_seed = chosen.stages[strategy]
            stages = min(len(taken) for taken in by_seed.values())
            of_strategies[strategy] = np.array(
                [[_mean(values[seed][name], ids) for ids in taken[:stages]] for seed, taken in by_seed.items()]
            )
        pool_S = np.array([np.mean(list(by_set[name].values())) for by_set in values.values()])
        found.append(Similarity(name, pool_S, of_strategies))
    return found


def _mean(of_prompt: Mapping[str, float], ids: frozenset[str]) -> float:
    return float(np.mean([of_prompt[i] for i in sorted(ids)])) if ids else float("nan")


def _similarity(pool: Pool) -> dict[str, dict[str, float]]:
    """By validation set and prompt id."""
    texts, ids = list(pool.texts.values()), list(pool.texts)
    of_sets = {name: [words(text) for text in own] for name, own in pool.validation.items()}
    values = tfidf_similarity([words(text) for text in texts], of_sets, "mean")
    return {name: dict(zip(ids, values_N.tolist(), strict=True)) for name, values_N in values.items()}
