"""A whole comparison: plan, runs, table, statistics, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cropi.artifacts import write_json
from cropi.console import say, warn
from cropi.errors import ConfigError
from cropi.lab.compare.embedding import sentence_encoder
from cropi.lab.compare.execute import Failure, default_jobs, execute
from cropi.lab.compare.plan import Run, lock, make_plan, parse_seeds, read_plan
from cropi.lab.compare.report.page import make_comparison_report
from cropi.lab.compare.results import RESULTS_FILE, read_results, write_results, write_results_up_to
from cropi.lab.compare.statistics import summarise

SUMMARY_FILE = "compare.json"


@dataclass(frozen=True)
class Analysis:
    """What is asked of the results."""

    references: Sequence[str] | None = None  # strategies to take differences from
    levels: Sequence[float] = ()  # accuracies to which costs are wanted
    main: str | None = None  # the strategy that the report's headline is about
    aside: Sequence[str] = ()  # scenarios that do not count in the suite's speed-up
    embedding: Path | None = None  # a sentence encoder for the similarity of selected prompts; unset: TF-IDF


def compare_runs(
    configs: Sequence[str],
    overrides: Sequence[str],
    strategies: Sequence[str],
    seeds: str,
    folder: Path,
    *,
    jobs: int | None,
    analysis: Analysis,
    keep_checkpoints: bool,
) -> tuple[dict[str, Any], list[Failure]]:
    """Do the runs that are missing and write what all of the folder's runs show; returns that and what failed.

    The same arguments go on where an earlier call stopped, others add to it. Raises the errors of `make_plan`.
    """
    with lock(folder):
        plan = make_plan(configs, overrides, strategies, parse_seeds(seeds), folder)
        named = [("--reference", name) for name in analysis.references or []]
        named += [("--main", analysis.main)] if analysis.main is not None else []
        for option, name in named:
            if name not in plan.strategies:
                raise ConfigError(f"{name!r} is none of the strategies", where=option, fix="add it to them.")
        if analysis.embedding is not None:
            sentence_encoder(analysis.embedding)  # refuses a folder without a model before anything runs
        missing = [run for run in plan.wanted if not run.finished]
        _check_trainers(missing)
        jobs = jobs or (default_jobs([run.config for run in missing]) if missing else 1)
        say(f"{len(missing)} of {len(plan.wanted)} runs to do" + (f", {jobs} at a time" if missing else ""))
        try:
            failures = execute(plan, jobs, keep_checkpoints=keep_checkpoints)
        except KeyboardInterrupt:
            write_results(plan)
            raise
        write_results(plan)
        summary = write_summary(plan.folder, analysis)
    if failures:
        warn(f"{len(failures)} of {len(plan.wanted)} runs failed; the same command tries them again")
    return summary, failures


def _check_trainers(runs: Sequence[Run]) -> None:
    """Settings that TRL refuses are refused before anything runs: of every scenario and strategy once."""
    if not runs:
        return
    import torch

    from cropi.training.grpo_settings import grpo_config

    for run in {(run.scenario, run.strategy): run for run in runs}.values():
        try:
            grpo_config(run.config, run.config.folder, torch.device("cpu"))
        except ConfigError as error:
            where = f"strategy {run.strategy} on {run.scenario}"
            raise ConfigError(error.what, where=where, fix="correct its settings of the trainer.") from None


def compare_up_to(step: int, folder: Path, results: Path | None, analysis: Analysis) -> tuple[dict[str, Any], Path]:
    """What the runs of a comparison, or those of a table, had reached after so many steps; also where that was put.

    Makes no run, and may be called while the comparison goes on. Raises the errors of `write_results_up_to`.
    """
    source = results if results is not None else read_plan(folder)
    made = write_results_up_to(step, source)
    return write_summary(made, analysis, up_to_step=step), made


def write_summary(folder: Path, analysis: Analysis, up_to_step: int | None = None) -> dict[str, Any]:
    """compare.json and the report of the results.parquet in a folder.

    A reference, or a main strategy, of which no run has come to its end is left out.
    """
    table = read_results(folder / RESULTS_FILE)
    there = set(table.column("strategy").to_pylist())
    references = analysis.references and [name for name in analysis.references if name in there]
    summary = summarise(table, references, analysis.levels, analysis.aside, up_to_step)
    write_json(folder / SUMMARY_FILE, summary)
    encoder = None if analysis.embedding is None else sentence_encoder(analysis.embedding)
    make_comparison_report(folder, analysis.main if analysis.main in there else None, encoder)
    return summary
