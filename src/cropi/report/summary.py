"""A run in numbers, from its files, and in sentences. In these, text between backticks is a name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import compress
from statistics import fmean
from typing import Any

import numpy as np

from cropi.config import Config
from cropi.functional.intervals import CONFIDENCE, Interval, stratified_mean
from cropi.report.costs import Cost, charges
from cropi.report.reading import (
    Answers,
    Results,
    StageQuality,
    read_answers,
    read_collected,
    read_quality,
    read_selection,
    selection_table,
)
from cropi.report.wording import ABSENT, count, decimal, on_one_line, percent, seconds, share, with_interval
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
    names = [name for name, test in config.prompts.test.items() if test.targeted == targeted and name in results]
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


def _seed(config: Config) -> int:
    return derived_seed(config.seed, "report")


def _pool(run: RunFolder) -> int | None:
    """Training prompts to select from: those of the first selection, before one is made those with trajectories."""
    table = selection_table(run.stages, 0)
    if table is not None:
        return len(table)
    collected = read_collected(run)
    sets = {} if collected is None else collected.details.get("sets", {})
    return sum(sets["train"]["signal"].values()) if "train" in sets else None


# -- the result in numbers and sentences ---------------------------------------------------------------------------


def large_numbers(summary: Summary) -> list[tuple[str, str, str]]:
    """Label, value and detail: accuracy now and before, on both kinds of test sets, and the cost."""
    cost = summary.cost
    found = [
        _accuracy_now(kind, getattr(summary.base, kind, None), getattr(summary.last, kind, None))
        for kind in ("targeted", "untargeted")
    ]
    if not summary.tested and summary.reward_curve:
        first, last = _quarters(summary)
        found = [("mean reward of training", decimal(last), f"last quarter; {decimal(first)} in the first")]
    found.append(("steps", str(summary.steps or ABSENT), f"of {summary.total_steps}; seed {summary.seed}"))
    if cost.total and cost.train:
        detail = f"{share(1 - cost.train / cost.total)} of it beside training"
        found.append(("time", seconds(cost.total), detail))
    return [number for number in found if number is not None]


def _accuracy_now(kind: str, before: Interval | None, now: Interval | None) -> tuple[str, str, str] | None:
    shown = now or before
    if shown is None:
        return None
    level = f"[{decimal(shown.low)}, {decimal(shown.high)}]"
    was = f"{decimal(before.mean)} before; " if now and before else "" if now else "before training; "
    return f"{kind} accuracy", decimal(shown.mean), f"{was}{level}"


def headline(summary: Summary) -> str:
    """Say what the run reached, with intervals and the number of seeds."""
    sentences = [_accuracy(summary), _untargeted(summary), _cost(summary), _caveat(summary)]
    return " ".join(sentence for sentence in sentences if sentence)


def _accuracy(summary: Summary) -> str:
    base = with_interval(summary.base.targeted) if summary.base and summary.base.targeted else ""
    if not summary.tested:
        return f"This run has no test set, so its accuracy is not measured. {_reward_change(summary)}"
    if summary.last is None:
        said = f"The base policy solves {base} of the targeted test questions." if base else ""
        return f"{said} Training has not been evaluated yet." if said else "Nothing has been evaluated yet."
    if summary.last.targeted is None:
        return "No test set is marked as targeted, so there is no targeted accuracy."
    of = "" if summary.finished else f" of {summary.total_steps}"
    solved = with_interval(summary.last.targeted)
    start = f"After {summary.steps}{of} steps, `{summary.strategy}` solves {solved} of the targeted test questions"
    return start + (f"; the base policy solved {base}." if base else ".") + f" It trained on {_share(summary)}."


def _reward_change(summary: Summary) -> str:
    if not summary.reward_curve:
        return "No training reward has been recorded yet."
    first, last = map(decimal, _quarters(summary))
    return f"The mean reward of training was {first} in the first quarter of its steps so far, and {last} in the last."


def _quarters(summary: Summary) -> tuple[float, float]:
    """Mean reward in the first and in the last quarter of training so far."""
    rewards = [reward for _, reward in summary.reward_curve]
    part = -(-len(rewards) // 4)
    return fmean(rewards[:part]), fmean(rewards[-part:])


def _share(summary: Summary) -> str:
    prompts = f"{count(summary.pool)} prompts" if summary.pool is not None else "the prompts"
    return f"a pool of {prompts}" if summary.fraction is None else f"{percent(summary.fraction)} of {prompts} per stage"


def _untargeted(summary: Summary) -> str:
    if summary.last is None or summary.last.untargeted is None:
        return ""
    text = f"Of the untargeted questions it solves {with_interval(summary.last.untargeted)}"
    base = summary.base.untargeted if summary.base else None
    return text + (f"; the base policy solved {with_interval(base)}." if base else ".")


def _cost(summary: Summary) -> str:
    """Share of the time that was not training."""
    cost = summary.cost
    if not summary.finished or not cost.total or cost.train is None:
        return ""
    return f"All beside training took {share(1 - cost.train / cost.total)} of the run's time."


def _caveat(summary: Summary) -> str:
    if not summary.tested or (summary.base is None and not summary.steps):
        return ""
    level = percent(CONFIDENCE)
    return f"One seed ({summary.seed}): the {level} intervals cover the choice of questions, not of seeds."


# -- a line for every stage ----------------------------------------------------------------------------------------

SOURCES = 3  # that are named, of those with most prompts
NAME = 24  # characters of one


def stage_line(run: RunFolder, summary: Summary, stage: int) -> str:
    """`stage 0 (1 of 3) · accuracy 0.61, was 0.15 · chose sum 39 %, hop 3 % · 1:57, 21 % beside training`."""
    steps = run.config.train.steps_per_stage
    start, end = stage * steps, (stage + 1) * steps
    parts = [_stage_accuracy(summary, start, end), _chosen(run, stage), _stage_cost(run, start, end)]
    return " · ".join([f"stage {stage} ({stage + 1} of {run.config.train.stages})", *filter(None, parts)])


def _stage_accuracy(summary: Summary, start: int, end: int) -> str:
    """Targeted accuracy at the last evaluation up to the end of the stage, and at the last one up to its start."""
    known = {point.step: point.targeted or point.untargeted for point in summary.curve}
    was, now = (known.get(max((step for step in known if step <= at), default=-1)) for at in (start, end))
    return f"accuracy {decimal(now.mean)}, was {decimal(was.mean)}" if now and was else ""


def _chosen(run: RunFolder, stage: int) -> str:
    """Sources of the places in its batches where they are chosen one by one, else of its selection."""
    batches = [batch["prompt_ids"] for batch in read_jsonl(run.stages.choices) if batch["stage"] == stage]
    selection = read_selection(run.stages, stage)
    if selection is None:
        return ""
    source_of = dict(zip(selection.prompt_ids, selection.sources, strict=True))
    taken = Counter(source_of[prompt_id] for batch in batches for prompt_id in batch)
    taken = taken or Counter(compress(selection.sources, selection.selected))
    if not batches and all(selection.selected):
        return f"all {len(selection.selected):,} prompts"
    shares = (f"{on_one_line(name, NAME)} {100 * n / taken.total():.0f} %" for name, n in taken.most_common(SOURCES))
    return f"chose {', '.join(shares)}"


def _stage_cost(run: RunFolder, start: int, end: int) -> str:
    """Seconds of the stage; before the first one also those of collection."""
    spent = charges(run.config, run.stages)
    before, after = spent.up_to(start).cost(), spent.up_to(end).cost()
    if after.total is None or after.train is None:
        return ""
    total = after.total - (before.total or 0.0)
    train = after.train - (before.train or 0.0)
    return f"{seconds(total)}, {percent(round(1 - train / total, 2))} beside training" if total else ""
