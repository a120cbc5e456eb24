"""One line for every stage: the accuracy, what was chosen, and what it cost."""

from __future__ import annotations

from collections import Counter
from itertools import compress

from cropi.report.costs import charges
from cropi.report.reading import read_selection
from cropi.report.results import Summary
from cropi.report.wording import decimal, on_one_line, percent, seconds
from cropi.run_folder import RunFolder
from cropi.streams import read_jsonl

SOURCES = 3  # that are named, of those with most prompts
NAME = 24  # characters of one


def stage_line(run: RunFolder, summary: Summary, stage: int) -> str:
    """`stage 0 (1 of 3) · accuracy 0.61, was 0.15 · chose sum 39 %, hop 3 % · 1:57, 21 % beside training`."""
    steps = run.config.train.steps_per_stage
    start, end = stage * steps, (stage + 1) * steps
    parts = [_accuracy(summary, start, end), _chosen(run, stage), _cost(run, start, end)]
    return " · ".join([f"stage {stage} ({stage + 1} of {run.config.train.stages})", *filter(None, parts)])


def _accuracy(summary: Summary, start: int, end: int) -> str:
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


def _cost(run: RunFolder, start: int, end: int) -> str:
    """Seconds of the stage; before the first one also those of collection."""
    spent = charges(run.config, run.stages)
    before, after = spent.up_to(start).cost(), spent.up_to(end).cost()
    if after.total is None or after.train is None:
        return ""
    total = after.total - (before.total or 0.0)
    train = after.train - (before.train or 0.0)
    return f"{seconds(total)}, {percent(round(1 - train / total, 2))} beside training" if total else ""
