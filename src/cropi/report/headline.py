"""The result of a run, and of each stage: numbers, a paragraph, a line. Text between backticks is a name."""

from __future__ import annotations

from collections import Counter
from itertools import compress
from statistics import fmean

from cropi.functional.intervals import CONFIDENCE, Interval
from cropi.report.costs import charges
from cropi.report.reading import read_selection
from cropi.report.summary import Summary
from cropi.report.wording import ABSENT, count, decimal, on_one_line, percent, seconds, share, with_interval
from cropi.run_folder import RunFolder
from cropi.streams import read_jsonl


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
        return f"This run has no test set, so its accuracy is not measured. {_rewards(summary)}"
    if summary.last is None:
        said = f"The base policy solves {base} of the targeted test questions." if base else ""
        return f"{said} Training has not been evaluated yet." if said else "Nothing has been evaluated yet."
    if summary.last.targeted is None:
        return "No test set is marked as targeted, so there is no targeted accuracy."
    of = "" if summary.finished else f" of {summary.total_steps}"
    solved = with_interval(summary.last.targeted)
    start = f"After {summary.steps}{of} steps, `{summary.strategy}` solves {solved} of the targeted test questions"
    return start + (f"; the base policy solved {base}." if base else ".") + f" It trained on {_share(summary)}."


def _rewards(summary: Summary) -> str:
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
    return f"Collecting, scoring and selecting took {share(1 - cost.train / cost.total)} of the run's time."


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
