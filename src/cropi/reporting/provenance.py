"""Where the numbers come from: settings, versions, and the command that makes them again."""

from __future__ import annotations

import json
import platform
import shlex
from importlib import metadata

from cropi.config import Config
from cropi.reporting.blocks import Block, Code, Table, Text
from cropi.workspace import Workspace

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "numpy", "pyarrow")


def settings(config: Config, space: Workspace) -> list[Block]:
    """The resolved config, and the versions of the packages that decide the numbers."""
    rows = [["cropi", version, "as recorded with the run's artifacts"] for version in _recorded(space)]
    rows.append(["Python", platform.python_version(), "where this report was written"])
    rows += [[name, version, "where this report was written"] for name in PACKAGES if (version := _installed(name))]
    resolved = json.dumps(config.resolved(), indent=2, ensure_ascii=False)
    return [
        Code("Every setting, defaults included (config.json)", resolved, collapsed=True),
        Table("Versions.", ["package", "version", "known from"], rows, left=3, collapsed=True),
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
            "The same machine and versions give the same selections; other hardware rounds differently. A comparison "
            "of strategies needs several seeds; this page describes one run."
        ),
    ]


def _recorded(space: Workspace) -> list[str]:
    """Versions of cropi in the manifests of the run."""
    found = set()
    for path in space.folder.rglob("manifest.json"):
        try:
            found.add(str(json.loads(path.read_text(encoding="utf-8"))["cropi"]))
        except (ValueError, KeyError, TypeError):
            continue  # not one of ours
    return sorted(found)


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
