"""The numbers of a run, from its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cropi.config import Config
from cropi.functional.bootstrap import CONFIDENCE, REDRAWS, Interval
from cropi.report.costs import charges
from cropi.report.headline import headline
from cropi.report.reading import (
    Answers,
    Results,
    group_statuses,
    read_answers,
    read_quality,
    read_verdicts,
    selection_table,
)
from cropi.report.results import Point, Summary
from cropi.run_folder import RunFolder
from cropi.seeds import derived_seed
from cropi.streams import read_jsonl

POINTS = 50  # of a reward curve

__all__ = ["Summary", "headline", "summarise"]


def summarise(config: Config, run: RunFolder) -> Summary:
    """Compute the numbers of a run from its folder. What is not there yet is None or absent."""
    answers = read_answers(run.stages.evaluations)
    base, trained = answers.get(0), max((row["step"] for row in read_jsonl(run.stages.steps)), default=0)
    steps = max(answers, default=0) if config.prompts.test else trained
    return Summary(
        name=config.name,
        strategy=config.select.label,
        seed=config.seed,
        total_steps=config.train.stages * config.train.steps_per_stage,
        evaluate_every=config.evaluate.every or config.train.steps_per_stage,
        fraction=None if config.select.strategy.takes_all else config.select.fraction,
        pool=_pool(run),
        tested=bool(config.prompts.test),
        base=_point(config, 0, base) if base else None,
        base_by_set=_by_set(config, base) if base else {},
        steps=steps,
        curve=tuple(_point(config, step, found) for step, found in answers.items()),
        final=_by_set(config, answers[steps]) if steps and steps in answers else {},
        cost=charges(config, run.stages).cost(),
        stages=read_quality(config, run.stages),
        rewards=_rewards(read_jsonl(run.stages.rewards), config.train.steps_per_stage),
        reward_curve=_reward_curve(read_jsonl(run.stages.rewards)),
    )


def _rewards(batches: Iterable[Mapping[str, Any]], steps_per_stage: int) -> tuple[float | None, ...]:
    """Mean reward of the completions that training sampled, by stage. None: no completion of a stage had a reward."""
    by_stage: dict[int, list[float]] = {}
    for batch in batches:
        known = [reward for reward in batch["rewards"] if reward is not None]
        by_stage.setdefault(batch["step"] // steps_per_stage, []).extend(known)
    stages = range(max(by_stage, default=-1) + 1)
    return tuple(float(np.mean(by_stage[stage])) if by_stage.get(stage) else None for stage in stages)


def _reward_curve(batches: Iterable[Mapping[str, Any]]) -> tuple[tuple[float, float], ...]:
    """Mean step and mean reward of at most `POINTS` equal parts of the generation batches."""
    known = [(batch["step"], [one for one in batch["rewards"] if one is not None]) for batch in batches]
    means = np.array([(step, np.mean(rewards)) for step, rewards in known if rewards])
    parts = np.array_split(means, min(POINTS, len(means))) if len(means) else []
    return tuple((float(step), float(reward)) for step, reward in (part.mean(0) for part in parts))


def _point(config: Config, step: int, answers: Answers) -> Point:
    return Point(step, *(_mean(config, answers.greedy, targeted=which) for which in (True, False)))


def _mean(config: Config, results: Results, *, targeted: bool) -> Interval | None:
    names = [name for name in _names(config, targeted=targeted) if name in results]
    values = [np.array(list(results[name].values())) for name in names]
    return stratified_mean(values, seed=_seed(config)) if values else None


def _by_set(config: Config, answers: Answers) -> dict[str, dict[str, Interval]]:
    """Accuracy by test set, in the config's order."""
    kinds = {"greedy": answers.greedy, "sampled": answers.sampled}
    return {
        name: {
            kind: stratified_mean([np.array(list(r[name].values()))], seed=_seed(config))
            for kind, r in kinds.items()
            if name in r
        }
        for name in config.prompts.test
        if name in answers.greedy
    }


def _names(config: Config, *, targeted: bool) -> list[str]:
    return [name for name, test in config.prompts.test.items() if test.targeted == targeted]


def _seed(config: Config) -> int:
    return derived_seed(config.seed, "report")


def _pool(run: RunFolder) -> int | None:
    """Training prompts to select from: those of the first selection, before one is made those with trajectories."""
    table = selection_table(run.stages, 0)
    if table is not None:
        return len(table)
    verdicts = read_verdicts(run)
    return None if verdicts is None else len(group_statuses(verdicts))


def stratified_mean(sets: Sequence[np.ndarray], *, seed: int, redraws: int = REDRAWS) -> Interval:
    """Mean of the sets' means, with its percentile bootstrap interval over questions.

    Every set keeps its size and its weight: questions are redrawn with replacement within each set. Redrawing N
    questions is drawing how often each distinct value occurs, so one multinomial draw over the distinct values does it,
    exactly. Raises ValueError for no sets or an empty one.
    """
    if not sets or not all(len(values_N) for values_N in sets):
        raise ValueError("cannot take the mean of no questions")
    generator = np.random.default_rng(seed)
    means_RS = []
    for values_N in sets:
        distinct_U, counts_U = np.unique(values_N, return_counts=True)
        draws_RU = generator.multinomial(len(values_N), counts_U / len(values_N), size=redraws)
        means_RS.append(draws_RU @ distinct_U / len(values_N))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.mean(means_RS, axis=0), [tail, 1 - tail])
    mean = float(np.mean([values_N.mean() for values_N in sets]))
    return Interval(mean, float(low), float(high))
