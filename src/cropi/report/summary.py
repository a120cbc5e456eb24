"""From the files of a run to its numbers, and the paragraph that says what was seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cropi.artifacts import read_jsonl
from cropi.config import Config
from cropi.functional.bootstrap import Interval
from cropi.report.costs import Entry, arm_cost, shared_seconds
from cropi.report.headline import headline
from cropi.report.intervals import stratified_mean
from cropi.report.reading import (
    Answers,
    Results,
    group_statuses,
    read_answers,
    read_verdicts,
    read_worth,
    selection_table,
)
from cropi.report.results import ArmSummary, Difference, Point, Summary
from cropi.seeds import derived_seed
from cropi.workspace import Workspace

__all__ = ["Summary", "headline", "summarise"]

History = Mapping[int, Answers]  # evaluations of one arm by step, the base policy's included
ROUNDING = 1e-12  # two means of means that are equal on paper may differ by this much


def summarise(config: Config, workspace: Workspace) -> Summary:
    """The numbers of a run, computed from what its folder holds now. What is not there yet is None or absent."""
    base = read_answers(workspace.evaluation).get(0)
    histories = {name: _history(base, read_answers(arm.evaluation)) for name, arm in workspace.arms.items()}
    curves = {name: tuple(_point(config, step, a) for step, a in past.items()) for name, past in histories.items()}
    total = config.train.stages * config.train.steps_per_stage
    target = _target(curves.get("full", ()), total)
    ledger = workspace.ledger.entries()
    main = next(iter(histories))
    return Summary(
        name=config.name,
        seed=config.seed,
        total_steps=total,
        evaluate_every=config.evaluate.every or config.train.steps_per_stage,
        confidence=config.evaluate.confidence,
        fraction=config.select.fraction,
        pool=_pool(workspace),
        tested=bool(config.prompts.test),
        base=_point(config, 0, base) if base else None,
        base_by_set=_by_set(config, base) if base else {},
        arms=tuple(_arm(config, workspace, n, histories[n], curves[n], target, ledger) for n in histories),
        differences=tuple(
            difference
            for other in histories
            if other != main and (difference := _difference(config, main, other, histories))
        ),
        target=target,
        shared_seconds=shared_seconds(ledger),
    )


def _history(base: Answers | None, own: Mapping[int, Answers]) -> dict[int, Answers]:
    return ({0: base} if base else {}) | {step: answers for step, answers in own.items() if step > 0}


def _arm(
    config: Config,
    workspace: Workspace,
    name: str,
    history: History,
    curve: Sequence[Point],
    target: float | None,
    ledger: Sequence[Entry],
) -> ArmSummary:
    steps, arm = max(history, default=0), workspace.arm(name)
    reached = None if target is None else _first_at(curve, target)
    return ArmSummary(
        name=name,
        steps=steps,
        finished=steps == config.train.stages * config.train.steps_per_stage,
        curve=tuple(curve),
        final=_by_set(config, history[steps]) if steps else {},
        steps_to_target=reached,
        seconds_to_target=arm_cost(arm, config, ledger, up_to_step=reached).total if reached else None,
        cost=arm_cost(arm, config, ledger),
        stages=read_worth(config, arm),
        rewards=_rewards(read_jsonl(arm.rewards), config.train.steps_per_stage),
    )


def _rewards(batches: Iterable[Mapping[str, Any]], steps_per_stage: int) -> tuple[float | None, ...]:
    """Mean reward of the completions that training sampled, by stage. None: no completion of a stage had a reward."""
    by_stage: dict[int, list[float]] = {}
    for batch in batches:
        known = [reward for reward in batch["rewards"] if reward is not None]
        by_stage.setdefault(batch["step"] // steps_per_stage, []).extend(known)
    stages = range(max(by_stage, default=-1) + 1)
    return tuple(float(np.mean(by_stage[stage])) if by_stage.get(stage) else None for stage in stages)


def _target(curve: Sequence[Point], total: int) -> float | None:
    """`full`'s accuracy at the run's last step."""
    last = next((point for point in curve if point.step == total), None)
    return last.targeted.mean if last and last.targeted else None


def _first_at(curve: Iterable[Point], target: float) -> int | None:
    reached = (p.step for p in curve if p.targeted is not None and p.targeted.mean >= target - ROUNDING)
    return next(reached, None)


def _point(config: Config, step: int, answers: Answers) -> Point:
    return Point(step, *(_mean(config, answers.greedy, targeted=which) for which in (True, False)))


def _mean(config: Config, results: Results, *, targeted: bool) -> Interval | None:
    names = [name for name in _names(config, targeted=targeted) if name in results]
    values = [np.array(list(results[name].values())) for name in names]
    return stratified_mean(values, config.evaluate, seed=_seed(config)) if values else None


def _by_set(config: Config, answers: Answers) -> dict[str, dict[str, Interval]]:
    """Accuracy by test set, in the config's order."""
    kinds = {"greedy": answers.greedy, "sampled": answers.sampled}
    return {
        name: {
            kind: stratified_mean([np.array(list(r[name].values()))], config.evaluate, seed=_seed(config))
            for kind, r in kinds.items()
            if name in r
        }
        for name in config.prompts.test
        if name in answers.greedy
    }


def _difference(config: Config, main: str, other: str, histories: Mapping[str, History]) -> Difference | None:
    """The paired difference at the last step evaluated for both; None where there is none beyond the base policy."""
    step = max(set(histories[main]) & set(histories[other]), default=0)
    if step == 0:
        return None
    first, second = histories[main][step].greedy, histories[other][step].greedy
    values = []
    for name in _names(config, targeted=True):
        common = first.get(name, {}).keys() & second.get(name, {}).keys()
        if common:
            values.append(np.array([first[name][i] - second[name][i] for i in sorted(common)]))
    if not values:
        return None
    accuracy = stratified_mean(values, config.evaluate, seed=_seed(config))
    return Difference(main, other, step, sum(map(len, values)), accuracy)


def _names(config: Config, *, targeted: bool) -> list[str]:
    return [name for name, test in config.prompts.test.items() if test.targeted == targeted]


def _seed(config: Config) -> int:
    return derived_seed(config.seed, "report")


def _pool(workspace: Workspace) -> int | None:
    """Training prompts to select from: those of the first selection, before one is made those with trajectories."""
    for arm in workspace.arms.values():
        table = selection_table(arm, 0)
        if table is not None:
            return len(table)
    verdicts = read_verdicts(workspace)
    return None if verdicts is None else len(group_statuses(verdicts))
