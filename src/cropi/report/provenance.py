"""Where the numbers come from: settings, versions, and the command that makes them again."""

from __future__ import annotations

import json
import shlex

from cropi.artifacts import read_sealed
from cropi.config import Config
from cropi.report.blocks import Block, Code, Table, Text
from cropi.run_folder import ENVIRONMENT, RunFolder


def settings(config: Config, run: RunFolder) -> list[Block]:
    """The resolved config, and the versions of the packages that decide the numbers."""
    rows = [[name, value] for name, value in _environment(run).items()]
    resolved = json.dumps(config.resolved(), indent=2, ensure_ascii=False)
    return [
        Code("Every setting, defaults included (config.json)", resolved, collapsed=True),
        Table("Where the run was started (environment.json).", ["what", "version"], rows, left=2, collapsed=True),
    ]


def reproduction(config: Config) -> list[Block]:
    """The command that makes the run again, and the one for another seed."""
    path = shlex.quote((config.folder / "config.json").as_posix())
    again = f"cropi run {path} run_dir=again"
    other = f"cropi run {path} name={config.name}-seed{config.seed + 1} seed={config.seed + 1}"
    return [
        Text(
            f"The seed of this run is {config.seed}. `config.json` in the run's folder is a complete config: the one "
            "under Settings. From the folder where the run was started:"
        ),
        Code("the same run, into another folder", again),
        Code("another seed", other),
        Text(
            "The same machine and versions give the same selections; other hardware rounds differently. To compare "
            "strategies over several seeds: `cropi compare`."
        ),
    ]


def _environment(run: RunFolder) -> dict[str, str]:
    """What the run noted of its machine and packages when it was started."""
    path = run.folder / ENVIRONMENT
    return read_sealed(path) if path.is_file() else {}
