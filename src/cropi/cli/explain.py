"""`cropi explain`: why prompts were or were not selected."""

from __future__ import annotations

from typing import Annotated

import typer

from cropi.cli.shell import AsJson, print_result, read_config
from cropi.errors import ArtifactError, UserError

DEFAULT_TOP = 10


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
            "--top", min=1, help="Without ids: so many of the stage's best ranked.", show_default=str(DEFAULT_TOP)
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Why prompts were or were not selected."""
    if prompt_ids and top is not None:
        raise UserError("both prompts and --top are given", where="--top", fix="leave one of them out.")
    loaded = read_config(config, None)
    if not (loaded.folder / "config.json").is_file():
        raise ArtifactError(
            "there is no such run",
            where=str(loaded.folder),
            fix=f"run `cropi run {config}` first, or name the folder of a run.",
        )
    from cropi.report.explanations import as_text, explanations
    from cropi.run_folder import RunFolder

    found = explanations(
        loaded,
        RunFolder(loaded),
        prompt_ids or [],
        stage=stage,
        top=None if prompt_ids else top or DEFAULT_TOP,
    )
    print_result({"prompts": [each.as_json() for each in found]}, as_json, as_text(found))
