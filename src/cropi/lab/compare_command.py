"""`cropi compare`: strategies against each other at equal cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cropi.cli.shell import AsJson, print_result, quiet_libraries
from cropi.errors import UserError

Configs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG... [key=value]...",
        help="Recipes, YAML files or `suite` (all of its recipes), and settings that replace theirs.",
        show_default=False,
    ),
]
Strategies = Annotated[str, typer.Option(help="Presets and YAML patches, with commas between.")]
Seeds = Annotated[str, typer.Option(help="Such as 0-4 or 0,1,7.")]
Folder = Annotated[Path, typer.Option(help="Where the runs go; the same again adds to it.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Runs at once.", show_default="what cores and memory allow")]
Reference = Annotated[
    str | None, typer.Option(help="Strategies to take differences from.", show_default="full, if it is there")
]
Levels = Annotated[
    str | None, typer.Option(help="Targeted accuracies to which costs are wanted as well.", show_default="none")
]
Main = Annotated[
    str | None, typer.Option(help="Strategy that the report's headline is about.", show_default="the best")
]
Aside = Annotated[
    str | None,
    typer.Option(help="Scenarios left out of the suite's speed-up: nothing to gain there.", show_default="none"),
]
Embedding = Annotated[
    Path | None, typer.Option(help="Sentence encoder for the similarity of selected prompts.", show_default="TF-IDF")
]
KeepCheckpoints = Annotated[bool, typer.Option(help="Do not delete those of finished runs.")]
Results = Annotated[
    Path | None,
    typer.Option(help="No runs: statistics and report of such a table, written beside it.", show_default=False),
]
UpToStep = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="No runs: what those of --folder or --results had reached by then, finished or not, in a folder step-N.",
        show_default=False,
    ),
]


def compare(
    configs: Configs = None,
    strategies: Strategies = "full,random,learnability,influence",
    seeds: Seeds = "0-4",
    folder: Folder = Path("runs/compare"),
    jobs: Jobs = None,
    reference: Reference = None,
    levels: Levels = None,
    main: Main = None,
    aside: Aside = None,
    embedding: Embedding = None,
    keep_checkpoints: KeepCheckpoints = False,
    results: Results = None,
    up_to_step: UpToStep = None,
    as_json: AsJson = False,
) -> None:
    """Train strategies on scenarios and seeds; speed-ups with intervals."""
    references = None if reference is None else _names(reference)
    goals = _levels(levels)
    quiet_libraries()
    from cropi.lab.compare.results import RESULTS_FILE
    from cropi.lab.compare.run import Analysis, compare_runs, compare_up_to, write_summary
    from cropi.lab.compare.table import as_text

    analysis = Analysis(references, goals, main, _names(aside), embedding)
    if configs and (results is not None or up_to_step is not None):
        option = "--results" if results is not None else "--up-to-step"
        raise UserError(f"both configs and {option} are given", where=option, fix="leave one of them out.")
    if results is not None and results.name != RESULTS_FILE:
        raise UserError(f"{results} is not named {RESULTS_FILE}", where="--results", fix="rename it.")
    if results is not None or up_to_step is not None:
        made = folder if results is None else results.parent
        if up_to_step is None:
            summary = write_summary(made, analysis)
        else:
            summary, made = compare_up_to(up_to_step, folder, results, analysis)
        print_result(summary, as_json, f"{as_text(summary)}\n\nreport: {made / 'compare.html'}")
        return
    names = [given for given in configs or [] if "=" not in given or Path(given).is_file()]
    overrides = [given for given in configs or [] if given not in names]
    if not names:
        raise UserError("no config is named", where="CONFIG", fix="name a recipe, a YAML file, or `suite`.")
    summary, failures = compare_runs(
        names,
        overrides,
        _names(strategies),
        seeds,
        folder,
        jobs=jobs,
        analysis=analysis,
        keep_checkpoints=keep_checkpoints,
    )
    places = f"results: {folder / RESULTS_FILE}\nreport: {folder / 'compare.html'}"
    print_result(summary, as_json, f"{as_text(summary)}\n\n{places}")
    if failures:
        raise typer.Exit(2 if all(failure.user_error for failure in failures) else 1)


def _names(text: str | None) -> list[str]:
    return [] if text is None else [name.strip() for name in text.split(",")]


def _levels(text: str | None) -> list[float]:
    try:
        levels = [] if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        levels = [-1.0]
    if not all(0 < level <= 1 for level in levels):
        raise UserError(f"{text!r} are no accuracies", where="--levels", fix="give 0.8,0.9, say.")
    return levels
