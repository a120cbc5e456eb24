"""Options of `cropi compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cropi.cli.shell import AsJson
from cropi.errors import UserError

NO_RUNS = "Make no runs; "


@dataclass(frozen=True)
class CompareOptions:
    """Runs to make, and what to compute from them."""

    configs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG... [key=value]...",
            help="Recipes, YAML files, `suite` (all its recipes), `drawn` (scenarios drawn at random) or `drawn-SEED`, "
            "and settings that replace theirs.",
            show_default=False,
        ),
    ] = None
    strategies: Annotated[str, typer.Option(help="Presets and YAML patches, separated by commas.")] = (
        "full,random,similarity,cropi"
    )
    scenarios: Annotated[int, typer.Option(min=1, help="Number of scenarios of `drawn`.")] = 40
    first_draw: Annotated[int, typer.Option(min=0, help="Seed of the first scenario that `drawn` may take.")] = 0
    seeds: Annotated[str, typer.Option(help="Such as 0-4 or 0,1,7.")] = "0-4"
    folder: Annotated[Path, typer.Option(help="Folder of the runs; a later call adds to it.")] = Path("runs/compare")
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once.", show_default="by cores and memory")] = None
    reference: Annotated[
        str | None, typer.Option(help="Strategies to take differences from.", show_default="full, if it was run")
    ] = None
    levels: Annotated[
        str | None, typer.Option(help="Targeted accuracies to give costs for as well.", show_default="none")
    ] = None
    main: Annotated[str | None, typer.Option(help="Strategy of the headline.", show_default="the best")] = None
    aside: Annotated[
        str | None,
        typer.Option(help="Scenarios without anything to gain: not in the suite's speed-up.", show_default="none"),
    ] = None
    keep_checkpoints: Annotated[bool, typer.Option(help="Keep the checkpoints of finished runs.")] = False
    results: Annotated[
        Path | None,
        typer.Option(help=f"{NO_RUNS}write statistics and report beside this table.", show_default=False),
    ] = None
    up_to_step: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"{NO_RUNS}compare what those of --folder or --results had reached by this step, in a folder step-N.",
            show_default=False,
        ),
    ] = None
    as_json: AsJson = False

    @property
    def references(self) -> list[str] | None:
        """Strategies to take differences from; None: the default."""
        return None if self.reference is None else _names(self.reference)

    @property
    def strategy_names(self) -> list[str]:
        """Presets and files of patches."""
        return _names(self.strategies)

    @property
    def set_aside(self) -> list[str]:
        """Scenarios that do not count in the suite's speed-up."""
        return _names(self.aside)

    @property
    def names(self) -> list[str]:
        """Configs to run."""
        return [word for word in self.configs or [] if "=" not in word or Path(word).is_file()]

    @property
    def overrides(self) -> list[str]:
        """Settings that replace those of the configs."""
        return [word for word in self.configs or [] if word not in self.names]

    @property
    def accuracies(self) -> list[float]:
        """Targeted accuracies to give costs for. UserError for anything that is none."""
        try:
            levels = [float(part) for part in _names(self.levels)]
        except ValueError:
            levels = [-1.0]
        if not all(0 < level <= 1 for level in levels):
            raise UserError(f"{self.levels!r} are not accuracies", where="--levels", fix="give 0.8,0.9, say.")
        return levels


def _names(text: str | None) -> list[str]:
    return [] if text is None else [name.strip() for name in text.split(",")]
