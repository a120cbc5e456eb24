"""A whole comparison: plan, runs, table, statistics, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cropi.artifacts import write_json
from cropi.compare.execute import Failure, default_jobs, execute
from cropi.compare.plan import Plan, Run, lock, make_plan, parse_seeds
from cropi.compare.results import read_results, write_results
from cropi.compare.statistics import summarise
from cropi.console import say, warn
from cropi.errors import ConfigError

SUMMARY_FILE = "compare.json"


def compare_runs(
    configs: Sequence[str],
    overrides: Sequence[str],
    strategies: Sequence[str],
    seeds: str,
    folder: Path,
    *,
    jobs: int | None,
    references: Sequence[str] | None,
    levels: Sequence[float],
    keep_checkpoints: bool,
) -> tuple[dict[str, Any], list[Failure]]:
    """Do the runs that are missing and write what all of the folder's runs show; returns that and what failed.

    The same arguments go on where an earlier call stopped, others add to it. Raises the errors of `make_plan`.
    """
    with lock(folder):
        plan = make_plan(configs, overrides, strategies, parse_seeds(seeds), folder)
        for name in references or []:
            if name not in plan.strategies:
                raise ConfigError(f"{name!r} is none of the strategies", where="--reference", fix="add it to them.")
        missing = [run for run in plan.wanted if not run.finished]
        _check_trainers(missing)
        jobs = jobs or (default_jobs([run.config for run in missing]) if missing else 1)
        say(f"{len(missing)} of {len(plan.wanted)} runs to do" + (f", {jobs} at a time" if missing else ""))
        try:
            failures = execute(plan, jobs, keep_checkpoints=keep_checkpoints)
        except KeyboardInterrupt:
            write_results(plan)
            raise
        summary = write_summary(plan, references, levels)
    if failures:
        warn(f"{len(failures)} of {len(plan.wanted)} runs failed; the same command tries them again")
    return summary, failures


def _check_trainers(runs: Sequence[Run]) -> None:
    """Settings that TRL refuses are refused before anything runs: of every scenario and strategy once."""
    if not runs:
        return
    import torch

    from cropi.training.settings import grpo_config

    for run in {(run.scenario, run.strategy): run for run in runs}.values():
        try:
            grpo_config(run.config, run.config.folder, torch.device("cpu"))
        except ConfigError as error:
            where = f"strategy {run.strategy} on {run.scenario}"
            raise ConfigError(error.what, where=where, fix="correct its settings of the trainer.") from None


def write_summary(plan: Plan, references: Sequence[str] | None, levels: Sequence[float]) -> dict[str, Any]:
    """results.parquet, compare.json and the report of all finished runs of a folder.

    A reference of which no run has come to its end is left out.
    """
    table = read_results(write_results(plan))
    there = set(table.column("strategy").to_pylist())
    summary = summarise(table, references and [name for name in references if name in there], levels)
    write_json(plan.folder / SUMMARY_FILE, summary)
    return summary
