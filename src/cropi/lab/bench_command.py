"""`cropi bench`: measurements of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cropi.cli.shell import AsJson, leave, print_result, quiet_libraries
from cropi.errors import UserError

if TYPE_CHECKING:
    from cropi.lab.bench.settings import EngineSettings

bench = typer.Typer(help="Measure the influence engine.", no_args_is_help=True)


def _measured(settings: EngineSettings, out: Path | None) -> dict[str, Any]:
    from cropi.lab.bench.engine import bench_engine
    from cropi.lab.bench.settings import resolve

    plan = resolve(settings)
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError("there is no such folder", where=str(out.absolute().parent), fix="make it, or name another.")
    try:
        return bench_engine(plan)
    except KeyboardInterrupt:
        leave("interrupted; a measurement starts over", 130)


def _keep(result: dict[str, Any], out: Path | None) -> None:
    from cropi.artifacts import write_json

    if out is not None:
        write_json(out, result)


OutOption = Annotated[Path | None, typer.Option("--out", help="Write the JSON to this file.", show_default=False)]


@bench.command("engine")
def bench_engine(
    shape: Annotated[
        str | None, typer.Option(help="tiny, 10m, 135m, qwen2.5-0.5b, -1.5b or -7b. [default: 10m]")
    ] = None,
    workload: Annotated[str, typer.Option(help="realistic, plain or builtin.")] = "realistic",
    prompts: Annotated[int | None, typer.Option(help="Train prompts.", show_default="by workload")] = None,
    validation: Annotated[int | None, typer.Option(help="Validation prompts.", show_default="by workload")] = None,
    rounds: Annotated[int, typer.Option(help="Times that each contender is run, taking turns.")] = 3,
    contenders: Annotated[
        str | None, typer.Option(help="Names with commas between.", show_default="all but generate and train")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.", show_default="by device")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads of each contender.")] = 1,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a pass.", show_default="by device")] = None,
    bergson_python: Annotated[
        Path | None, typer.Option(help="Python of an environment that holds bergson.", show_default=False)
    ] = None,
    recipe_dim: Annotated[
        int | None, typer.Option(help="Output of the recipe's dense projection.", show_default="by device")
    ] = None,
    seed: Annotated[int, typer.Option(help="For weights and rows.")] = 0,
    grow: Annotated[bool, typer.Option("--grow", help="Also: memory with ten times as many prompts.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also: where our time goes, by kind of operation.")
    ] = False,
    out: OutOption = None,
    as_json: AsJson = False,
) -> None:
    """Speed, memory and faithfulness beside floors and other engines."""
    quiet_libraries()
    from cropi.lab.bench.settings import EngineSettings

    chosen = {} if contenders is None else {"contenders": tuple(name.strip() for name in contenders.split(","))}
    result = _measured(
        EngineSettings(
            shape=shape,
            workload=workload,
            prompts=prompts,
            validation=validation,
            rounds=rounds,
            dtype=dtype,
            device=device,
            threads=threads,
            batch_tokens=batch_tokens,
            bergson_python=bergson_python,
            recipe_dim=recipe_dim,
            seed=seed,
            grow=grow,
            profile=profile,
            **chosen,
        ),
        out,
    )
    from cropi.lab.bench.table import engine_text

    _keep(result, out)
    print_result(result, as_json, engine_text(result))


@bench.command("share")
def bench_share(
    source: Annotated[
        Path | None, typer.Option("--from", help="JSON of `bench engine`; without it, measure now.", show_default=False)
    ] = None,
    shape: Annotated[str, typer.Option(help="As for `bench engine`, when measuring now.")] = "10m",
    prompts: Annotated[int | None, typer.Option(help="Likewise.", show_default=False)] = None,
    rounds: Annotated[int, typer.Option(help="Likewise.")] = 3,
    dtype: Annotated[str | None, typer.Option(help="Likewise.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="Likewise.")] = "auto",
    threads: Annotated[int, typer.Option(help="Likewise.")] = 1,
    budget_fraction: Annotated[float, typer.Option(help="Cost of a cheaper scoring, as a part of the whole.")] = 0.25,
    out: OutOption = None,
    as_json: AsJson = False,
) -> None:
    """Scoring and selecting as a share of training time."""
    if not 0 < budget_fraction <= 1:
        raise UserError(f"{budget_fraction:g} is no part of 1", where="--budget-fraction", fix="give 0.25, say.")
    quiet_libraries()
    from cropi.lab.bench import share
    from cropi.lab.bench.settings import EngineSettings
    from cropi.lab.bench.table import share_text

    if source is None:
        settings = EngineSettings(
            shape=shape,
            prompts=prompts,
            rounds=rounds,
            dtype=dtype,
            device=device,
            threads=threads,
            contenders=share.NEEDED,
        )
        measured = _measured(settings, out)
    else:
        measured = share.read_result(source)
    result = share.bench_share(measured, budget_fraction)
    _keep(result, out)
    print_result(result, as_json, share_text(result))
