"""The order of the stages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from cropi.artifacts import Manifest
from cropi.console import say
from cropi.errors import ArtifactError
from cropi.parallel import process_group
from cropi.report.run_report import make_report
from cropi.report.summary import Summary, stage_line
from cropi.stages.collect import collect, make_prompt_table
from cropi.stages.evaluate import read_questions
from cropi.stages.run import Run
from cropi.stages.score import score
from cropi.stages.select import select
from cropi.stages.train import require_reached, train


def run_all(run: Run) -> Summary | None:
    """Do everything from the prompts to the report. Finished artifacts are kept, so the same call goes on.

    Returns the summary, to the first process.
    """
    make_prompt_table(run)
    read_questions(run)  # refuses test prompts before anything is sampled
    collect(run)
    train(run, partial(_tell_and_select, run))
    if not process_group().is_main:
        return None
    summary = make_report(run.folder)
    say(stage_line(run.folder, summary, run.config.train.stages - 1))
    return summary


def _tell_and_select(run: Run, stage: int, model: nn.Module, in_progress: bool) -> Sequence[str]:
    """Select the prompts of a stage; before, rewrite the report and say in one line what the stage before brought."""

    def tell() -> None:
        summary = make_report(run.folder, live=True)
        if stage and not in_progress:
            say(stage_line(run.folder, summary, stage - 1))

    process_group().from_main(tell)
    return select_stage(run, stage, model, in_progress)


def train_all(run: Run) -> Path:
    """Score, select, train and evaluate, stage by stage; returns the last checkpoint."""
    return train(run, partial(select_stage, run))


def select_stage(run: Run, stage: int, model: nn.Module, in_progress: bool) -> Sequence[str]:
    """Select the prompts of a stage with the policy in memory. The trainer calls this at the start of a stage.

    `in_progress`: training resumed inside or beyond the stage, so its selection must be there.
    """
    folder = run.paths.selection(stage)
    if in_progress and not run.is_finished(folder):
        raise ArtifactError(
            f"the selection of stage {stage} is gone, but training stands in or beyond that stage",
            where=str(folder),
            fix="put back a copy of it, or start the run under another name.",
        )
    if not in_progress:
        strategy = run.config.select.strategy
        if strategy.reads_scores and strategy.scored_stage(stage) == stage:
            score(run, stage, run.asked(model).model, run.origin(stage))
    return select(run, stage)


def score_at(run: Run, stage: int, checkpoint: Path | None) -> tuple[Path, Manifest]:
    """Score at the start of a stage, or at a checkpoint from outside; returns the folder of the scores."""
    run = run.at_checkpoint(stage, checkpoint)
    policy, origin = run.policy_at(stage, checkpoint)
    return run.paths.scores(stage), score(run, stage, policy.model, origin)


def select_at(run: Run, stage: int, checkpoint: Path | None) -> tuple[Path, list[str]]:
    """Select by hand at a stage, or at a checkpoint from outside; returns the folder of the selection and the ids."""
    run = run.at_checkpoint(stage, checkpoint)
    require_reached(run, stage)
    return run.paths.selection(stage), select(run, stage)
