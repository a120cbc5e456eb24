"""`cropi`: the commands that make up a run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from cropi import __version__
from cropi.cli.first_config import init, schema, write_config
from cropi.cli.runs import list_runs, watch
from cropi.cli.shell import (
    TOGETHER,
    AsJson,
    CheckpointOption,
    Commands,
    ConfigArgument,
    Overrides,
    RayOption,
    StageOption,
    WorkersOption,
    begun_config,
    leave,
    open_run,
    print_result,
    quiet_libraries,
    read_own_config,
)
from cropi.cli.verify import audit_rewards, verify
from cropi.console import say
from cropi.errors import UserError
from cropi.exchange.formats import FORMATS
from cropi.parallel import is_first_rank, launched, leave_launcher

EXPLAINED = 10  # prompts, if none is named

app = typer.Typer(
    cls=Commands,
    help="Train on the prompts that help most now: influence-guided curricula for RL with verifiable rewards.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes = typer.Typer(help="Complete configs that come with the package.", invoke_without_command=True)
app.add_typer(recipes, name="recipes")
app.command()(init)
app.command()(schema)
app.command()(verify)
app.command("audit-rewards")(audit_rewards)
app.command("ls")(list_runs)
app.command()(watch)


@app.command()
def run(config: ConfigArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Do everything, from the prompts to the report. Run it again to go on."""
    opened = open_run(config, overrides)
    from cropi.pipeline import run_all
    from cropi.report.summary import headline

    summary = run_all(opened)
    if summary is None:
        return
    policy = opened.paths.checkpoints / f"checkpoint-{opened.config.train.steps}"
    text = f"\n{headline(summary)}\n\npolicy: {policy}\nreport: {opened.folder.folder / 'report.html'}"
    print_result(summary.as_json(), as_json, text)


@app.command()
def collect(
    config: ConfigArgument,
    overrides: Overrides = None,
    ray: RayOption = None,
    workers: WorkersOption = None,
    as_json: AsJson = False,
) -> None:
    """Sample and judge K trajectories per prompt."""
    opened = open_run(config, overrides, ray=ray, workers=workers)
    from cropi.stages.collect import collect as collect_trajectories

    manifest = collect_trajectories(opened)
    path = str(opened.folder.trajectories)
    print_result({"path": path, "counts": dict(manifest.counts)}, as_json, path)


@app.command()
def score(
    config: ConfigArgument,
    overrides: Overrides = None,
    stage: StageOption = 0,
    checkpoint: CheckpointOption = None,
    ray: RayOption = None,
    workers: WorkersOption = None,
    as_json: AsJson = False,
) -> None:
    """Influence of every prompt on the validation sets."""
    opened = open_run(config, overrides, ray=ray, workers=workers)
    from cropi.pipeline import score_at

    folder, manifest = score_at(opened, stage, checkpoint)
    path = str(folder / "scores.parquet")
    print_result({"path": path, "counts": dict(manifest.counts)}, as_json, path)


@app.command()
def select(
    config: ConfigArgument,
    overrides: Overrides = None,
    stage: StageOption = 0,
    checkpoint: CheckpointOption = None,
    as_json: AsJson = False,
) -> None:
    """Choose the prompts of a stage, with reasons."""
    opened = open_run(config, overrides)
    from cropi.pipeline import select_at

    folder, chosen = select_at(opened, stage, checkpoint)
    path = str(folder / "selected.jsonl")
    print_result({"path": path, "selected": len(chosen)}, as_json, path)


@app.command()
def train(config: ConfigArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Score, select, train and evaluate, stage by stage."""
    opened = open_run(config, overrides)
    from cropi.pipeline import train_all

    path = str(train_all(opened))
    print_result({"path": path}, as_json, path)


@app.command()
def evaluate(
    config: ConfigArgument, overrides: Overrides = None, checkpoint: CheckpointOption = None, as_json: AsJson = False
) -> None:
    """Accuracy of the base policy or any checkpoint."""
    opened = open_run(config, overrides)
    from cropi.report.reading import answers_of
    from cropi.report.summary import accuracy_by_set
    from cropi.stages.evaluate import evaluate_at

    found = accuracy_by_set(opened.config, answers_of(evaluate_at(opened, checkpoint)))
    result = {name: {kind: vars(interval) for kind, interval in kinds.items()} for name, kinds in found.items()}
    lines = [
        f"{name}  {kind}  {value['mean']:.3f}  [{value['low']:.3f}, {value['high']:.3f}]"
        for name, kinds in result.items()
        for kind, value in kinds.items()
    ]
    print_result(result, as_json, "\n".join(lines))


@app.command()
def report(config: ConfigArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Write the report of what a run's folder holds."""
    from cropi.report.run_report import make_report
    from cropi.report.summary import headline
    from cropi.run_folder import RunFolder

    loaded = begun_config(config, overrides)
    summary = make_report(RunFolder(loaded))
    print_result(summary.as_json(), as_json, f"{headline(summary)}\n\nreport: {loaded.folder / 'report.html'}")


@app.command()
def explain(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A run's folder, its config.json, a YAML file or a recipe's name.")
    ],
    prompt_ids: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT_ID", help="Training prompts.", show_default=False)
    ] = None,
    stage: Annotated[
        int | None, typer.Option("--stage", min=0, help="One stage, counted from 0.", show_default="all")
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            "--top", min=1, help="Without ids: so many of the stage's best ranked.", show_default=str(EXPLAINED)
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Why prompts were or were not selected."""
    if prompt_ids and top is not None:
        raise UserError("both prompts and --top are given", where="--top", fix="leave one of them out.")
    loaded = begun_config(config, None)
    from cropi.report.explanations import as_text, explanations
    from cropi.run_folder import RunFolder

    found = explanations(
        loaded, RunFolder(loaded), prompt_ids or [], stage=stage, top=None if prompt_ids else top or EXPLAINED
    )
    print_result({"prompts": [each.as_json() for each in found]}, as_json, as_text(found))


@app.command()
def export(
    config: ConfigArgument,
    overrides: Overrides = None,
    format_name: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "trl",
    stage: StageOption = 0,
    checkpoint: CheckpointOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to write to.", show_default="exports/ in the run's folder")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a stage's selection as another trainer's files, with the verifier and the run's settings."""
    loaded = read_own_config(config, overrides)
    quiet_libraries()
    from cropi.exchange.export import export as write
    from cropi.run_folder import RunFolder
    from cropi.stages.run import paths_at

    run = RunFolder(loaded)
    paths = paths_at(run, stage, checkpoint)
    outside = "" if checkpoint is None else f"{paths.folder.name}-"
    place = f"{outside}stage-{stage:03}-{format_name}"
    folder = (output or loaded.folder / "exports" / place).absolute()
    manifest = write(run, paths, stage, format_name, checkpoint, folder)
    counts = dict(manifest.counts)
    print_result({"path": str(folder), "counts": counts}, as_json, f"{folder}\nhow to use it: {folder / 'README.md'}")


@app.command("import")
def import_rollouts(
    config: ConfigArgument,
    dumps: Annotated[list[Path], typer.Argument(metavar="DUMP", help="Files, or folders of them.")],
    checkpoint: CheckpointOption = None,
    as_json: AsJson = False,
) -> None:
    """Read rollouts of verl or TRL as trajectories of the run, or of the scoring at a checkpoint.

    Log-probs come from the policy of that checkpoint, else from the base policy.
    """
    opened = open_run(config, None)
    from cropi.exchange.dumps import import_rollouts as read

    run = opened.at_checkpoint(0, checkpoint)
    policy, origin = run.policy_at(0, checkpoint)
    manifest = read(run, policy, origin, dumps)
    path = str(run.paths.imported)
    print_result({"path": path, "counts": dict(manifest.counts), "prompts": manifest.details["prompts"]}, as_json, path)


@app.command()
def check(
    config: ConfigArgument,
    overrides: Overrides = None,
    dollars_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of this machine; adds the money that the run costs.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look at config, data, policy and cost; write nothing."""
    loaded = read_own_config(config, overrides)
    say(f"loading the policy {loaded.policy.path} …")
    quiet_libraries()
    from cropi.inspection import check_run

    result = check_run(loaded, dollars_per_hour)
    print_result(result.as_json(), as_json, result.as_text())


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, devices, memory and disk, to paste into a bug report."""
    quiet_libraries()
    from cropi.inspection import hardware

    facts = hardware()
    print_result(facts, as_json, "\n".join(f"{name:<16} {value}" for name, value in facts.items()))


# -- recipes -----------------------------------------------------------------------------------------------------------

RecipeName = Annotated[str, typer.Argument(help="Name of the recipe, with its folder: `suite/targeted`.")]


@recipes.callback()
def list_recipes(context: typer.Context, as_json: AsJson = False) -> None:
    """List the recipes."""
    if context.invoked_subcommand is not None:
        return
    from cropi.config.loading import recipe_names, recipe_text

    first_line = {name: recipe_text(name).splitlines()[0].lstrip("# ") for name in recipe_names()}
    print_result(first_line, as_json, "\n".join(f"{name:<18} {line}" for name, line in first_line.items()))


@recipes.command("show")
def show_recipe(name: RecipeName) -> None:
    """Print a recipe."""
    print(_recipe(name), end="")


@recipes.command("copy")
def copy_recipe(
    name: RecipeName, target: Annotated[Path, typer.Argument(help="Folder or file to write.")] = Path()
) -> None:
    """Write a recipe to a file that you can edit."""
    text = _recipe(name)
    path = target / f"{name.rpartition('/')[2]}.yaml" if target.is_dir() else target
    write_config(path, text)
    print(path)


def _recipe(name: str) -> str:
    from cropi.config.loading import recipe_names, recipe_text

    if name not in recipe_names():
        raise UserError(f"there is no recipe {name!r}", fix=f"choose one of: {', '.join(recipe_names())}.")
    return recipe_text(name)


# -- the command itself -----------------------------------------------------------------------------------------------


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cropi {__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""
    if launched() and ctx.invoked_subcommand not in TOGETHER:
        if ctx.invoked_subcommand == "compare":
            leave("error: compare starts its own processes\nFix: call it without a launcher.", 2)
        if not is_first_rank():
            raise typer.Exit  # one process is enough
        leave_launcher()


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 something the user can fix, 130 interrupted."""
    for number in INTERRUPTS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as of a process in the background
            signal.signal(number, _interrupted)
    app()


INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


def _interrupted(*_: object) -> None:
    """End the command in order; at the second interrupt at once, as the first may be waiting for something."""
    for number in INTERRUPTS:
        signal.signal(number, _ended)
    raise KeyboardInterrupt


def _ended(*_: object) -> None:
    os.write(2, b"interrupted; the same command goes on from here\n")
    os._exit(130)
