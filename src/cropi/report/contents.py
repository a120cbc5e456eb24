"""What a report says: its sections, from the numbers and the files of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cropi.config import Config
from cropi.functional.statistics import CONFIDENCE
from cropi.lab.audit.section import TITLE as AUDIT
from cropi.lab.audit.section import audit
from cropi.report import figures
from cropi.report.blocks import Block, Picture, Section, Table, Text
from cropi.report.closeups import closeups
from cropi.report.funnel import funnel
from cropi.report.provenance import reproduction, settings
from cropi.report.reading import Selection, directions, read_scores, read_selections, rows_with, scored_arm
from cropi.report.reliability import reliability
from cropi.report.results import ArmSummary, Summary
from cropi.report.shares import Shares, jaccard, source_shares
from cropi.report.summary import headline
from cropi.report.wording import (
    ABSENT,
    count,
    decimal,
    difference,
    percent,
    seconds,
    share,
    significant,
    tenths,
    with_interval,
)
from cropi.workspace import Arm, Workspace

COST_NOTE = (
    "Every arm is charged as if it were run alone. Collection is charged in full to each arm that uses the stored "
    "trajectories (`influence`, `learnability`, `pass_rate`), and not to `full` and `random`, which need none. The "
    "total is collect + score + select + train. Evaluation is shown beside it, not in it: it decides nothing. Training "
    "seconds are those of the optimiser steps, their rollouts included, that led to the final weights. Work that an "
    "interruption made void is counted for collection, scoring and selection, and not for training."
)


@dataclass(frozen=True)
class Run:
    """All that the sections are made from, read once."""

    config: Config
    space: Workspace
    summary: Summary
    selections: Mapping[str, Mapping[int, Selection]]  # by arm and stage
    scored: Arm | None  # the arm whose scores are shown
    scores: Mapping[int, pa.Table]  # its influence, by stage


def read_run(config: Config, space: Workspace, summary: Summary) -> Run:
    """Read selections and scores, as far as they are there."""
    stages = config.train.stages
    made = {name: read_selections(arm, stages) for name, arm in space.arms.items()}
    selections = {name: by_stage for name, by_stage in made.items() if by_stage}
    scored = scored_arm(config, space)
    return Run(config, space, summary, selections, scored, {} if scored is None else read_scores(config, scored))


def sections(run: Run) -> list[Section]:
    """The report, in order."""
    audited = audit(run.space.folder)
    return [
        Section("Result", _result(run.summary)),
        Section("Learning curves", _curves(run.summary)),
        Section("What was selected", _selected(run)),
        Section("Turnover between stages", _turnover(run)),
        Section("Distribution of the scores", _distributions(run)),
        Section("Can the ranking be trusted?", _reliability(run)),
        *([Section(AUDIT, audited)] if audited else []),
        Section("What became of every prompt", funnel(run.space, run.selections, run.scores)),
        Section("Cost", _cost(run.summary)),
        Section("Prompts, close up", closeups(run.config, run.space, run.scores)),
        Section("Settings", settings(run.config, run.space)),
        Section("How to reproduce it", reproduction(run.config)),
    ]


# -- result and curves ---------------------------------------------------------------------------------------------


def _result(summary: Summary) -> list[Block]:
    blocks: list[Block] = [Text(headline(summary), lead=True)]
    if summary.base is None and not any(arm.steps for arm in summary.arms):
        return blocks
    main = summary.main.name
    header = ["arm", "steps", "targeted", "untargeted", f"{main} − arm", "steps to full's", "time", "tokens generated"]
    base = summary.base
    first = ["base policy", "0", *(with_interval(i) for i in (base.targeted, base.untargeted))] if base else []
    rows = [[*first, *([ABSENT] * 4)]] if base else []
    rows += [_arm_row(arm, summary) for arm in summary.arms]
    compared = any(arm.name == "full" for arm in summary.arms)
    if not compared:  # nothing to reach: the column goes
        place = header.index("steps to full's")
        header, rows = [c for n, c in enumerate(header) if n != place], [r[:place] + r[place + 1 :] for r in rows]
    blocks.append(Table(_caption(summary, compared), header, rows, strong=1 if base else 0))
    return [*blocks, *_by_set(summary)]


def _caption(summary: Summary, compared: bool) -> str:
    reached = "Steps to `full`'s: the first evaluated step at its final targeted accuracy; evaluated every "
    return (
        "Greedy accuracy at the last evaluated step: the mean over test sets, with its interval over questions. The "
        "difference is paired: the same questions, targeted sets. "
        + (f"{reached}{summary.evaluate_every} steps. " if compared else "")
        + "Time and tokens include stored rollouts and selection where the arm uses them: see Cost."
    )


def _arm_row(arm: ArmSummary, summary: Summary) -> list[str]:
    last = arm.last
    against = next((d.accuracy for d in summary.differences if d.other == arm.name), None)
    accuracies = [with_interval(last.targeted), with_interval(last.untargeted)] if last else [ABSENT, ABSENT]
    return [
        arm.name,
        str(arm.steps) if arm.finished else f"{arm.steps} of {summary.total_steps}",
        *accuracies,
        difference(against) if against else ABSENT,
        _reached(arm, summary),
        seconds(arm.cost.total),
        count(arm.cost.tokens),
    ]


def _reached(arm: ArmSummary, summary: Summary) -> str:
    if summary.target is None or not arm.steps:
        return ABSENT
    if arm.steps_to_target is not None:
        return str(arm.steps_to_target)
    return "not reached" if arm.finished else "not yet"


def _by_set(summary: Summary) -> list[Block]:
    """Accuracy by test set; no table where there is one set only."""
    columns = {"base policy": summary.base_by_set} | {arm.name: arm.final for arm in summary.arms if arm.final}
    names = list(dict.fromkeys(name for by_set in columns.values() for name in by_set))
    keys = [(name, kind) for name in names for kind in ("greedy", "sampled")]
    rows = [
        [name, kind, *(with_interval(by_set.get(name, {}).get(kind)) for by_set in columns.values())]
        for name, kind in keys
        if any(kind in by_set.get(name, {}) for by_set in columns.values())
    ]
    return [Table("Accuracy by test set.", ["test set", "answers", *columns], rows, left=2)] if len(rows) > 1 else []


def _curves(summary: Summary) -> list[Block]:
    drawn = figures.learning_curves(summary)
    if drawn is None:
        text = "No arm has been evaluated yet." if summary.tested else "There is no test set to evaluate on."
        return [Text(text), *_rewards(summary)]
    level = percent(CONFIDENCE)
    caption = f"Greedy accuracy, mean over test sets. Bands: {level} bootstrap intervals over questions, one seed."
    arms = [arm for arm in summary.arms if arm.steps]
    steps = sorted({point.step for arm in arms for point in arm.curve})
    values = {arm.name: {point.step: with_interval(point.targeted) for point in arm.curve} for arm in arms}
    rows = [[str(step), *(values[arm.name].get(step, ABSENT) for arm in arms)] for step in steps]
    header = ["step", *(arm.name for arm in arms)]
    curves = Table("Targeted accuracy by step.", header, rows, left=0, collapsed=True)
    return [Picture(drawn, caption), curves, *_rewards(summary)]


def _rewards(summary: Summary) -> list[Block]:
    arms = [arm for arm in summary.arms if arm.rewards]
    if not arms:
        return []
    caption = "Mean reward of the completions that training sampled, by stage: each on the prompts of its own stage."
    rows = [
        [str(stage), *(decimal(arm.rewards[stage]) if stage < len(arm.rewards) else ABSENT for arm in arms)]
        for stage in range(max(len(arm.rewards) for arm in arms))
    ]
    return [Table(caption, ["stage", *(arm.name for arm in arms)], rows, left=0)]


# -- selections ----------------------------------------------------------------------------------------------------


def _selected(run: Run) -> list[Block]:
    shares = source_shares(run.selections)
    if not shares:
        return [Text("Nothing has been selected yet.")]
    # `full` takes the pool as it is, which is the first column of every other arm.
    shown = {arm: table for arm, table in shares.items() if arm != "full"} or shares
    drawn = figures.selection_shares(shown)
    caption = (
        "Share of each source in %, in the pool and in the selection of every stage. `full`, where it is an arm, takes "
        "the pool as it is."
    )
    blocks: list[Block] = [Picture(drawn, caption)] if drawn else []
    main = run.summary.main.name
    return [*blocks, _share_table(main, shares[main])] if main in shares else blocks


def _share_table(arm: str, shares: Shares) -> Table:
    stages = zip(shares.stage_counts.values(), shares.by_stage.values(), strict=True)
    columns = [(shares.pool_counts, shares.pool), *stages]
    rows = [
        [source, *(_counted(counts[row], part[row]) for counts, part in columns)]
        for row, source in enumerate(shares.sources)
    ]
    rows.append(["all", *(count(sum(counts)) for counts, _ in columns)])
    header = ["source", "pool", *(f"stage {stage}" for stage in shares.stage_counts)]
    return Table(f"Prompts selected by `{arm}`, by source.", header, rows, strong=len(rows) - 1)


def _counted(number: int, part: float) -> str:
    return f"{number:,} ({100 * part:.0f} %)" if number else "0"


def _turnover(run: Run) -> list[Block]:
    rows = []
    for arm, stages in run.selections.items():
        for stage, overlap in jaccard(stages).items():
            before, now = stages[stage - 1].chosen, stages[stage].chosen
            numbers = (count(len(part)) for part in (before & now, now - before, before - now))
            rows.append([arm, f"{stage - 1} → {stage}", *numbers, decimal(overlap)])
    if not rows:
        return [Text("There are no two consecutive selections of one arm.")]
    drawn = figures.turnover(run.selections, run.config.select.fraction)
    caption = "1: the same prompts again; 0: none of them. Dotted: what two independent random draws would share."
    header = ["arm", "stages", "kept", "new", "dropped", "overlap"]
    table = Table("Prompts kept, new and dropped. Overlap: kept ÷ (kept + new + dropped).", header, rows, left=2)
    return [*([Picture(drawn, caption)] if drawn else []), table]


def _distributions(run: Run) -> list[Block]:
    if run.scored is None:
        return [Text(_unscored(run.config))]
    names, chosen = directions(run.config, run.scored), run.selections.get(run.scored.name, {})
    drawn = figures.score_distributions(run.scores, chosen, names)
    caption = (
        f"Influence of the training prompts on each validation set (`{run.config.score.score}`): all prompts with a "
        "signal, and those selected. Prompts without one are left out; the outermost bars hold what lies beyond. At "
        f"most {figures.MAX_PANELS} sets and stages are drawn."
    )
    rows = [
        [name, str(stage), *_quantiles(table, name, chosen.get(stage))]
        for name in names
        for stage, table in run.scores.items()
    ]
    header = ["validation set", "stage", "prompts", "5 %", "median", "95 %", "selected", "their median"]
    title = f"Influence: quantiles over all prompts with a signal, and over those that `{run.scored.name}` selected."
    table = Table(title, header, rows, left=1)
    return [*([Picture(drawn, caption)] if drawn else []), table]


def _quantiles(table: pa.Table, name: str, selection: Selection | None) -> list[str]:
    with_signal = rows_with(table)
    values_N = with_signal.column(f"influence/{name}").to_numpy()
    if not len(values_N):
        return ["0", *([ABSENT] * 5)]
    cells = [count(len(values_N)), *(significant(float(value)) for value in np.percentile(values_N, (5, 50, 95)))]
    if selection is None:
        return [*cells, ABSENT, ABSENT]
    taken_N = np.isin(with_signal.column("prompt_id").to_pylist(), list(selection.chosen))
    median = significant(float(np.median(values_N[taken_N]))) if taken_N.any() else ABSENT
    return [*cells, count(int(taken_N.sum())), median]


def _reliability(run: Run) -> list[Block]:
    arm = run.scored
    summary = None if arm is None else run.summary.arm(arm.name)
    if arm is None or summary is None:
        return [Text(_unscored(run.config))]
    return reliability(run.config, arm, summary.stages, run.scores, run.selections.get(arm.name, {}))


def _unscored(config: Config) -> str:
    """Say whether influence is still to come or never will."""
    if any(strategy.reads_scores for strategy in config.arms.values()):
        return "Influence has not been computed yet."
    names = " and ".join(f"`{name}`" for name in config.arms)
    return f"This run computes no influence: {names} {'chooses' if len(config.arms) == 1 else 'choose'} without it."


# -- cost ----------------------------------------------------------------------------------------------------------


def _cost(summary: Summary) -> list[Block]:
    spent = [arm for arm in summary.arms if arm.cost.train is not None or arm.cost.score or arm.cost.select]
    if not spent and not summary.shared_seconds:
        return [Text("Nothing has been spent yet.")]
    phases = ("collect", "score", "select", "train", "total", "evaluate")
    rows = [
        [
            arm.name,
            *(tenths(getattr(arm.cost, phase)) for phase in phases),
            share(arm.cost.selection_share),
            count(arm.cost.collect_tokens),
            count(arm.cost.train_tokens),
        ]
        for arm in spent
    ]
    shared = summary.shared_seconds
    rows.append(["once, for all arms", *(tenths(shared.get(phase)) for phase in phases), *([ABSENT] * 3)])
    header = ["arm", *phases, "(score + select) ÷ train", "tokens collected", "tokens in training"]
    drawn = figures.cost_split(summary)
    caption = "Seconds by arm, evaluation left out."
    blocks: list[Block] = [Picture(drawn, caption)] if drawn else []
    return [*blocks, Table("Seconds by phase, and generated tokens.", header, rows), Text(COST_NOTE)]
