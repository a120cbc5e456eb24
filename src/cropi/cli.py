"""The command line. The only file that parses arguments; only the commands that need torch import it."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core

from cropi import __version__
from cropi.errors import UserError

if TYPE_CHECKING:
    from cropi.bench.settings import EngineSettings
    from cropi.config import Config
    from cropi.pipeline import Pipeline


class _Commands(typer.core.TyperGroup):
    """Turns errors into messages and exit codes around every command; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _leave(f"error: {error}", 2)
        except KeyboardInterrupt:
            _leave("interrupted; the same command goes on from here", 130)
        except Exception as error:
            if _disk_is_full(error):
                _leave("error: no space left on the disk\nFix: free some space and run the same command again.", 2)
            raise


app = typer.Typer(
    cls=_Commands,
    help="Train on the prompts that help most now: influence-guided curricula for RL with verifiable rewards.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes = typer.Typer(help="Complete configs that come with the package.", invoke_without_command=True)
app.add_typer(recipes, name="recipes")
bench = typer.Typer(help="Measure the influence engine.", no_args_is_help=True)
app.add_typer(bench, name="bench")

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A recipe's name or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="Settings that replace the config's.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
StageOption = Annotated[int, typer.Option("--stage", min=0, help="Stage to work on, counted from 0.")]
CheckpointOption = Annotated[
    Path | None, typer.Option("--checkpoint", help="Folder of a checkpoint of the policy.", show_default=False)
]


def _config(config: str, overrides: list[str] | None) -> Config:
    from cropi.loading import load_config

    return load_config(config, overrides or [])


def _pipeline(config: str, overrides: list[str] | None) -> Pipeline:
    loaded = _config(config, overrides)
    _quiet_libraries()
    from cropi.pipeline import Pipeline

    return Pipeline(loaded)


def _quiet_libraries() -> None:
    """No telemetry, and no progress bars beside our own. Set before the libraries are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _print(value: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(value, indent=2, allow_nan=False) if as_json else text)


@app.command()
def run(config: ConfigArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Prompts to report. Run it again to go on."""
    pipeline = _pipeline(config, overrides)
    from cropi.reporting.summary import headline

    summary = pipeline.run()
    last = pipeline.config.train.stages * pipeline.config.train.steps_per_stage
    policy = pipeline.arm_at(0, None).checkpoints / f"checkpoint-{last}"
    text = f"\n{headline(summary)}\n\npolicy: {policy}\nreport: {pipeline.space.folder / 'report.html'}"
    _print(summary.as_json(), as_json, text)


@app.command()
def collect(config: ConfigArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Sample and judge K trajectories per prompt."""
    pipeline = _pipeline(config, overrides)
    manifest = pipeline.collect()
    path = str(pipeline.space.trajectories)
    _print({"path": path, "counts": dict(manifest.counts)}, as_json, path)


@app.command()
def score(
    config: ConfigArgument,
    overrides: Overrides = None,
    stage: StageOption = 0,
    checkpoint: CheckpointOption = None,
    as_json: AsJson = False,
) -> None:
    """Influence of every prompt on the validation sets."""
    pipeline = _pipeline(config, overrides)
    arm = pipeline.arm_at(stage, checkpoint)
    policy, origin = pipeline.policy_at(arm, stage, checkpoint)
    manifest = pipeline.score(arm, stage, policy.model, origin)
    path = str(arm.scores(stage) / "scores.parquet")
    _print({"path": path, "counts": dict(manifest.counts)}, as_json, path)


@app.command()
def select(
    config: ConfigArgument,
    overrides: Overrides = None,
    stage: StageOption = 0,
    checkpoint: CheckpointOption = None,
    as_json: AsJson = False,
) -> None:
    """Choose the prompts of a stage, with reasons."""
    pipeline = _pipeline(config, overrides)
    arm = pipeline.arm_at(stage, checkpoint)
    pipeline.require_reached(arm, stage)
    chosen = pipeline.select(arm, stage)
    path = str(arm.selection(stage) / "selected.jsonl")
    _print({"path": path, "selected": len(chosen)}, as_json, path)


@app.command()
def train(config: ConfigArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Score, select, train and evaluate, stage by stage."""
    pipeline = _pipeline(config, overrides)
    paths = {arm.name: str(pipeline.train(arm)) for arm in pipeline.space.arms.values()}
    _print(paths, as_json, "\n".join(f"{name}: {path}" for name, path in paths.items()))


@app.command()
def evaluate(
    config: ConfigArgument, overrides: Overrides = None, checkpoint: CheckpointOption = None, as_json: AsJson = False
) -> None:
    """Accuracy of the base policy or any checkpoint."""
    pipeline = _pipeline(config, overrides)
    from cropi.evaluation.evaluate import accuracy, as_plain

    settings = pipeline.config
    table = pipeline.evaluate_at(checkpoint)
    result = as_plain(accuracy(table, settings.evaluate, seed=settings.seed))
    lines = [
        f"{name}  {kind}  {value['mean']:.3f}  [{value['low']:.3f}, {value['high']:.3f}]"
        for name, kinds in result.items()
        for kind, value in kinds.items()
    ]
    _print(result, as_json, "\n".join(lines))


@app.command()
def report(config: ConfigArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Write the report of what a run's folder holds."""
    from cropi.errors import ArtifactError
    from cropi.reporting.report import make_report
    from cropi.reporting.summary import headline

    loaded = _config(config, overrides)
    if not loaded.folder.is_dir():
        raise ArtifactError("there is no such run", where=str(loaded.folder), fix=f"run `cropi run {config}` first.")
    summary = make_report(loaded, loaded.folder)
    _print(summary.as_json(), as_json, f"{headline(summary)}\n\nreport: {loaded.folder / 'report.html'}")


@app.command()
def check(config: ConfigArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Look at config, data, policy and cost; write nothing."""
    loaded = _config(config, overrides)
    _quiet_libraries()
    from cropi.inspection import check_run

    result = check_run(loaded)
    _print(result.as_json(), as_json, result.as_text())


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, devices, memory and disk, to paste into a bug report."""
    _quiet_libraries()
    from cropi.inspection import hardware

    facts = hardware()
    _print(facts, as_json, "\n".join(f"{name:<16} {value}" for name, value in facts.items()))


@recipes.callback()
def list_recipes(context: typer.Context, as_json: AsJson = False) -> None:
    """List the recipes."""
    if context.invoked_subcommand is not None:
        return
    from cropi.loading import recipe_names, recipe_text

    first_line = {name: recipe_text(name).splitlines()[0].lstrip("# ") for name in recipe_names()}
    _print(first_line, as_json, "\n".join(f"{name:<16} {line}" for name, line in first_line.items()))


@recipes.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="Name of the recipe.")],
    target: Annotated[Path, typer.Argument(help="Folder or file to write.")] = Path(),
) -> None:
    """Write a recipe to a file, to be changed."""
    from cropi.loading import recipe_names, recipe_text

    if name not in recipe_names():
        raise UserError(f"there is no recipe {name!r}", fix=f"choose one of: {', '.join(recipe_names())}.")
    path = target / f"{name}.yaml" if target.is_dir() else target
    if path.exists():
        raise UserError("exists already", where=str(path), fix="choose another name; nothing is overwritten.")
    try:
        path.write_text(recipe_text(name), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror})", where=str(path), fix="choose another folder."
        ) from None
    print(path)


def _measured(settings: EngineSettings, out: Path | None) -> dict[str, Any]:
    from cropi.bench.engine import bench_engine
    from cropi.bench.settings import resolve

    plan = resolve(settings)
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError("there is no such folder", where=str(out.absolute().parent), fix="make it, or name another.")
    try:
        return bench_engine(plan)
    except KeyboardInterrupt:
        _leave("interrupted; a measurement starts over", 130)


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
    out: OutOption = None,
    as_json: AsJson = False,
) -> None:
    """Speed, memory and faithfulness beside floors and other engines."""
    _quiet_libraries()
    from cropi.bench.settings import EngineSettings

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
            **chosen,
        ),
        out,
    )
    from cropi.bench.table import engine_text

    _keep(result, out)
    _print(result, as_json, engine_text(result))


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
    _quiet_libraries()
    from cropi.bench import share
    from cropi.bench.settings import EngineSettings
    from cropi.bench.table import share_text

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
    _print(result, as_json, share_text(result))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cropi {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 something the user can fix, 130 interrupted."""
    signal.signal(signal.SIGTERM, _terminated)
    app()


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt


def _leave(text: str, code: int) -> NoReturn:
    print(text, file=sys.stderr, flush=True)
    sys.exit(code)


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error: libraries wrap it in errors of their own."""
    while error is not None:
        if getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT} or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main()
