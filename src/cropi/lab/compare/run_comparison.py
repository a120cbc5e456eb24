"""A whole comparison: plan, runs, table, statistics, report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from cropi.artifacts import write_json
from cropi.console import say, warn
from cropi.errors import ConfigError
from cropi.lab.compare.compare_options import CompareOptions
from cropi.lab.compare.comparison_plan import Plan, Run, lock, make_plan, parse_seeds, read_plan
from cropi.lab.compare.comparison_summary import summarise
from cropi.lab.compare.drawn import DRAWN, Checked, accepted, base_policy_check, draw, rejection
from cropi.lab.compare.paired_runs import Comparison, best_strategy, read_traces
from cropi.lab.compare.report.comparison_page import write_comparison_report
from cropi.lab.compare.result_table import RESULTS_FILE, read_results, write_results, write_results_up_to
from cropi.lab.compare.run_processes import Failure, default_jobs, execute
from cropi.lab.compare.so_far import SoFar


def compare_runs(options: CompareOptions) -> tuple[Comparison, list[Failure]]:
    """Do the missing runs, then write table, statistics and report of all runs in the folder.

    The same options resume an interrupted call; others add to the folder. Raises the errors of `make_plan`.
    """
    with lock(options.folder):
        seeds = parse_seeds(options.seeds)
        names = _with_drawn(options)
        plan = make_plan(names, options.overrides, options.strategy_names, seeds, options.folder)
        _check_names(options, plan)
        missing = [run for run in plan.wanted if not run.finished]
        _check_trainers(missing)
        jobs = options.jobs or (default_jobs([run.config for run in missing]) if missing else 1)
        say(f"{len(missing)} of {len(plan.wanted)} runs to do" + (f", {jobs} at a time" if missing else ""))
        try:
            failures = execute(plan, jobs, keep_checkpoints=options.keep_checkpoints, tell=SoFar(plan).tell)
        finally:
            write_results(plan)
        comparison = analyse(plan.folder, options)
    if failures:
        warn(f"{len(failures)} of {len(plan.wanted)} runs failed; the same command tries them again")
    return comparison, failures


def compare_results(options: CompareOptions) -> Comparison:
    """Compare the results of existing runs, all of them or up to a step."""
    source = options.results if options.results is not None else read_plan(options.folder)
    _check_names(options, source)
    if options.up_to_step is not None:
        return analyse(write_results_up_to(options.up_to_step, source), options)
    assert options.results is not None
    return analyse(options.results.parent, options)


def analyse(folder: Path, options: CompareOptions) -> Comparison:
    """Write `compare.json` and the report from the results in a folder.

    A reference, main strategy or scenario set aside without a finished run is left out.
    """
    table = read_results(folder / RESULTS_FILE)
    traces, known = read_traces(table), set(table.column("strategy").to_pylist())
    references = options.references and [name for name in options.references if name in known]
    summary = summarise(traces, references, options.accuracies, options.set_aside, options.up_to_step)
    write_json(folder / "compare.json", summary)
    named = options.main if options.main in known else None
    comparison = Comparison(folder, summary, traces, named or best_strategy(summary))
    write_comparison_report(comparison)
    return comparison


def _with_drawn(options: CompareOptions) -> list[str]:
    """The configs to run; `drawn` stands for the accepted scenarios. `drawn.json` keeps the base policy's answers."""
    if DRAWN not in options.names:
        return options.names
    path = options.folder / "drawn.json"
    known: dict[str, dict[str, list[float]]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    asked: list[Callable[[int], Checked]] = []

    def check(seed: int) -> Checked:
        name = f"{DRAWN}-{seed}"
        if name not in known:
            asked[:] = asked or [base_policy_check()]
            known[name] = {key: list(rates) for key, rates in asked[0](seed).items()}
            write_json(path, known)
        return known[name]

    drawn = [f"{DRAWN}-{seed}" for seed in accepted(options.scenarios, options.first_draw, check)]
    reasons = Counter(rejection(draw(int(name.split("-")[1])), checked) for name, checked in known.items())
    del reasons[None]
    rejected = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
    say(f"{len(drawn)} scenarios are drawn; rejected of {len(known)} draws so far: {rejected}")
    return [name for word in options.names for name in (drawn if word == DRAWN else [word])]


def _check_names(options: CompareOptions, source: Plan | Path) -> None:
    """ConfigError for a name that neither the plan nor the table of results has."""
    if isinstance(source, Plan):
        strategies, scenarios = source.strategies, list(dict.fromkeys(run.scenario for run in source.all))
    else:
        table = read_results(source)
        strategies, scenarios = (table.column(name).unique().to_pylist() for name in ("strategy", "scenario"))
    named = [("--reference", name, "strategies", strategies) for name in options.references or []]
    named += [("--main", options.main, "strategies", strategies)] if options.main is not None else []
    named += [("--aside", name, "scenarios", scenarios) for name in options.set_aside]
    for option, name, what, known in named:
        if name not in known:
            fix = f"name one of: {', '.join(known)}."
            raise ConfigError(f"{name!r} is none of the {what}", where=option, fix=fix)


def _check_trainers(runs: Sequence[Run]) -> None:
    """Refuse settings that TRL refuses before anything runs, once for every scenario and strategy."""
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
