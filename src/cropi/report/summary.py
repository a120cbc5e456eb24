"""The numbers of a run, from its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cropi.config import Config
from cropi.functional.intervals import Interval, stratified_mean
from cropi.report.costs import Cost, charges
from cropi.report.reading import (
    Answers,
    Results,
    StageQuality,
    group_statuses,
    read_answers,
    read_quality,
    read_verdicts,
    selection_table,
)
from cropi.run_folder import RunFolder
from cropi.seeds import derived_seed
from cropi.streams import read_jsonl

POINTS = 50  # of a reward curve


@dataclass(frozen=True)
class Point:
    """Greedy accuracy at one step: the mean over the targeted test sets and over the others. None: no such set."""

    step: int
    targeted: Interval | None
    untargeted: Interval | None


@dataclass(frozen=True)
class Summary:
    """A run in numbers."""

    name: str
    strategy: str
    seed: int
    total_steps: int
    evaluate_every: int
    fraction: float | None  # share of the pool that a stage selects; None: the strategy may take all
    pool: int | None  # training prompts to select from
    tested: bool  # whether the run has test sets
    base: Point | None
    base_by_set: Mapping[str, Mapping[str, Interval]]
    steps: int  # the last evaluated one, or of a run without test sets the last trained one; 0 before there is any
    curve: tuple[Point, ...]  # step 0 is the base policy
    final: Mapping[str, Mapping[str, Interval]]  # at `steps`: test set -> greedy, sampled; empty while `steps` is 0
    cost: Cost
    stages: tuple[StageQuality, ...]  # where the strategy scores by influence
    rewards: tuple[float | None, ...]  # mean reward of training by stage, as far as it has come
    reward_curve: tuple[tuple[float, float], ...]  # (step, mean reward of training) over neighbouring steps

    @property
    def finished(self) -> bool:
        """Whether `steps` are all."""
        return self.steps == self.total_steps

    @property
    def last(self) -> Point | None:
        """The point at the last evaluated step, None while there is none beyond the base policy."""
        return self.curve[-1] if self.curve and self.steps else None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values. Unknown numbers are null or absent, never NaN."""
        return asdict(self) | {"cost": self.cost.as_json()}


def summarise(config: Config, run: RunFolder) -> Summary:
    """Compute the numbers of a run from its folder. What is not there yet is None or absent."""
    answers = read_answers(run.stages.evaluations)
    base, trained = answers.get(0), max((row["step"] for row in read_jsonl(run.stages.steps)), default=0)
    steps = max(answers, default=0) if config.prompts.test else trained
    return Summary(
        name=config.name,
        strategy=config.select.label,
        seed=config.seed,
        total_steps=config.train.steps,
        evaluate_every=config.evaluate_every,
        fraction=None if config.select.strategy.takes_all else config.select.fraction,
        pool=_pool(run),
        tested=bool(config.prompts.test),
        base=_point(config, 0, base) if base else None,
        base_by_set=accuracy_by_set(config, base) if base else {},
        steps=steps,
        curve=tuple(_point(config, step, found) for step, found in answers.items()),
        final=accuracy_by_set(config, answers[steps]) if steps and steps in answers else {},
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


def accuracy_by_set(config: Config, answers: Answers) -> dict[str, dict[str, Interval]]:
    """Accuracy by test set: `greedy`, and `sampled` (avg@n) where there are samples."""
    kinds = {"greedy": answers.greedy, "sampled": answers.sampled}
    return {
        name: {
            kind: stratified_mean([np.array(list(r[name].values()))], seed=_seed(config))
            for kind, r in kinds.items()
            if name in r
        }
        for name in answers.greedy
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
