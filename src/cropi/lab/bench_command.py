"""`cropi bench`: measure the influence engine."""

from __future__ import annotations

import typer

from cropi.cli.shell import leave, print_result, quiet_libraries
from cropi.lab.bench.benchmark_options import EngineOptions, resolve
from cropi.lab.command_options import command_of

bench = typer.Typer(help="Measure the influence engine.", no_args_is_help=True)


def bench_engine(options: EngineOptions) -> None:
    """Measure speed, memory and accuracy against floors and other engines."""
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
