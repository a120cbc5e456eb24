"""`cropi compare`: compare strategies at equal cost."""

from __future__ import annotations

import typer

from cropi.cli.shell import print_result, quiet_libraries
from cropi.errors import UserError
from cropi.lab.command_options import command_of
from cropi.lab.compare.compare_options import CompareOptions

RESULTS_FILE = "results.parquet"


def compare_strategies(options: CompareOptions) -> None:
    """Train strategies on scenarios and seeds; report speed-ups with intervals."""
    _check(options)
    quiet_libraries()
    from cropi.lab.compare.report.comparison_page import terminal_text
    from cropi.lab.compare.run_comparison import compare_results, compare_runs

    no_runs = options.results is not None or options.up_to_step is not None
    comparison, failures = (compare_results(options), None) if no_runs else compare_runs(options)
    report = f"report: {comparison.folder / 'compare.html'}"
    print_result(dict(comparison.summary), options.as_json, f"{terminal_text(comparison)}\n\n{report}")
    if failures:
        raise typer.Exit(2 if all(failure.user_error for failure in failures) else 1)


def _check(options: CompareOptions) -> None:
    """Refuse options that contradict each other."""
    _ = options.accuracies
    option = "--results" if options.results is not None else "--up-to-step" if options.up_to_step is not None else None
    if options.configs and option:
        raise UserError(f"both configs and {option} are given", where=option, fix="leave one of them out.")
    if options.results is not None and options.results.name != RESULTS_FILE:
        raise UserError(f"{options.results} is not named {RESULTS_FILE}", where="--results", fix="rename it.")
    if not options.names and not option:
        raise UserError("no config is named", where="CONFIG", fix="name a recipe, a YAML file, or `suite`.")


compare = command_of(compare_strategies, CompareOptions)
