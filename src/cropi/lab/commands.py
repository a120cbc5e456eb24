"""The commands of the lab: `cropi compare`, `cropi audit` and `cropi bench`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from cropi.cli.shell import AsJson, ConfigArgument, Overrides, leave, open_run, print_result, quiet_libraries
from cropi.errors import UserError
from cropi.lab.bench.benchmark_options import EngineOptions, resolve
from cropi.lab.compare.compare_options import CompareOptions

RESULTS_FILE = "results.parquet"
Options = TypeVar("Options")


def command_of(run: Callable[[Options], None], options: type[Options]) -> Callable[..., None]:
    """Make a Typer command of a function that takes one dataclass: each field is an option or argument."""
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        parameter.replace(annotation=hints[name]) for name, parameter in inspect.signature(options).parameters.items()
    ]

    def command(**values: Any) -> None:
        run(options(**values))

    command.__doc__ = run.__doc__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


# -- compare -----------------------------------------------------------------------------------------------------------


def compare_strategies(options: CompareOptions) -> None:
    """Train strategies on scenarios and seeds; report speed-ups with intervals."""
    _check_compared(options)
    quiet_libraries()
    from cropi.lab.compare.report.comparison_page import terminal_text
    from cropi.lab.compare.run_comparison import compare_results, compare_runs

    no_runs = options.results is not None or options.up_to_step is not None
    comparison, failures = (compare_results(options), None) if no_runs else compare_runs(options)
    report = f"report: {comparison.folder / 'compare.html'}"
    print_result(dict(comparison.summary), options.as_json, f"{terminal_text(comparison)}\n\n{report}")
    if failures:
        raise typer.Exit(2 if all(failure.user_error for failure in failures) else 1)


def _check_compared(options: CompareOptions) -> None:
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


# -- audit -------------------------------------------------------------------------------------------------------------


def audit(
    config: ConfigArgument,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(min=8, help="Training prompts to sample again.")] = 160,
    trajectories: Annotated[int, typer.Option(min=4, help="Fresh completions of each prompt.")] = 32,
    stages: Annotated[str | None, typer.Option(help="Stages, separated by commas.", show_default="all on disk")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample and its completions.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare stored trajectories with fresh ones: noise, bias, drift."""
    wanted = None if stages is None else _stage_numbers(stages)
    run = open_run(config, overrides)
    from cropi.lab.audit.audit_report import audit_sections
    from cropi.lab.audit.run_audit import AuditSettings, audit_run
    from cropi.report.rendering import markdown, write_report

    result = audit_run(run, AuditSettings(prompts, trajectories, seed), wanted)
    folder, title, sections = run.folder.folder, f"cropi audit {run.config.name}", audit_sections(result)
    write_report(folder, "audit", title, sections)
    print_result(result, as_json, f"{markdown(title, sections)}\nreport: {folder / 'audit.html'}")


def _stage_numbers(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(
            f"{text!r} is not a list of stages", where="--stages", fix="give numbers, such as 0,2."
        ) from None


# -- bench -------------------------------------------------------------------------------------------------------------

bench = typer.Typer(help="Measure the influence engine.", no_args_is_help=True)


def bench_engine(options: EngineOptions) -> None:
    """Measure speed, memory and accuracy against floors."""
    quiet_libraries()
    resolved = resolve(options)
    from cropi.artifacts import write_json
    from cropi.lab.bench import engine_benchmark
    from cropi.lab.bench.benchmark_table import engine_text

    try:
        result = engine_benchmark.bench_engine(resolved)
    except KeyboardInterrupt:
        leave("interrupted; a measurement starts over", 130)
    if resolved.out is not None:
        write_json(resolved.out, result)
    print_result(result, resolved.as_json, engine_text(result))


bench.command("engine")(command_of(bench_engine, EngineOptions))
