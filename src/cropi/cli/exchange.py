"""`cropi export` and `cropi import`: selections to other trainers, their rollouts back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cropi.cli.shell import (
    AsJson,
    CheckpointOption,
    ConfigArgument,
    Overrides,
    StageOption,
    open_run,
    print_result,
    quiet_libraries,
    read_config,
)


def export(
    config: ConfigArgument,
    overrides: Overrides = None,
    format_name: Annotated[str, typer.Option("--format", help="trl, verl, slime, openrlhf or prime-rl.")] = "trl",
    stage: StageOption = 0,
    checkpoint: CheckpointOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to write to.", show_default="exports/ in the run's folder")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a stage's selection as another trainer's files, with its verifier and the commands to use them."""
    loaded = read_config(config, overrides)
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


def import_rollouts(
    config: ConfigArgument,
    dumps: Annotated[list[Path], typer.Argument(metavar="DUMP", help="Files, or folders of them.")],
    checkpoint: CheckpointOption = None,
    as_json: AsJson = False,
) -> None:
    """Read rollouts of verl or TRL back as trajectories of the run, or of what is scored at a checkpoint.

    Their log-probs are taken from the policy of that checkpoint, else from the base policy.
    """
    opened = open_run(config, None)
    from cropi.exchange.dumps import import_rollouts as read

    run = opened.at_checkpoint(0, checkpoint)
    policy, origin = run.policy_at(0, checkpoint)
    manifest = read(run, policy, origin, dumps)
    path = str(run.paths.imported)
    print_result({"path": path, "counts": dict(manifest.counts), "prompts": manifest.details["prompts"]}, as_json, path)
