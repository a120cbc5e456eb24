"""`cropi recipes`: configs that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cropi.cli.shell import AsJson, print_result
from cropi.errors import UserError

recipes = typer.Typer(help="Complete configs that come with the package.", invoke_without_command=True)

Name = Annotated[str, typer.Argument(help="Name of the recipe, with its folder: `suite/targeted`.")]


@recipes.callback()
def list_recipes(context: typer.Context, as_json: AsJson = False) -> None:
    """List the recipes."""
    if context.invoked_subcommand is not None:
        return
    from cropi.loading import recipe_names, recipe_text

    first_line = {name: recipe_text(name).splitlines()[0].lstrip("# ") for name in recipe_names()}
    print_result(first_line, as_json, "\n".join(f"{name:<18} {line}" for name, line in first_line.items()))


@recipes.command("show")
def show_recipe(name: Name) -> None:
    """Print a recipe."""
    print(_text(name), end="")


@recipes.command("copy")
def copy_recipe(
    name: Name,
    target: Annotated[Path, typer.Argument(help="Folder or file to write.")] = Path(),
) -> None:
    """Write a recipe to a file that you can edit."""
    text = _text(name)
    path = target / f"{name.rpartition('/')[2]}.yaml" if target.is_dir() else target
    if path.exists():
        raise UserError("exists already", where=str(path), fix="choose another name; nothing is overwritten.")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror})", where=str(path), fix="choose another folder."
        ) from None
    print(path)


def _text(name: str) -> str:
    from cropi.loading import recipe_names, recipe_text

    if name not in recipe_names():
        raise UserError(f"there is no recipe {name!r}", fix=f"choose one of: {', '.join(recipe_names())}.")
    return recipe_text(name)
