"""The folder of a run: where everything lies, and whose it is. Free of torch.

config.json  environment.json  ledger.jsonl  summary.json  report.html  report.md
prompts/  trajectories/  evaluation/ (the base policy)
arms/ARM/  stages/NNN/{scores,selection}/  evaluation/  checkpoints/  steps.jsonl  metrics.jsonl  rewards.jsonl
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from cropi.artifacts import PROMPTS, open_artifact, read_table, write_json
from cropi.config import Config, config_difference
from cropi.errors import ArtifactError, ConfigError
from cropi.ledger import Ledger


@dataclass(frozen=True)
class Arm:
    """Paths of one strategy's training."""

    name: str
    folder: Path

    def scores(self, stage: int) -> Path:
        return self.folder / "stages" / f"{stage:03}" / "scores"

    def selection(self, stage: int) -> Path:
        return self.folder / "stages" / f"{stage:03}" / "selection"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation"

    @property
    def rewards(self) -> Path:
        return self.folder / "rewards.jsonl"


class Workspace:
    """A run's folder, claimed for one config."""

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, config.folder
        self.ledger = Ledger(self.folder / "ledger.jsonl")
        _claim(config)

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts"

    @property
    def trajectories(self) -> Path:
        return self.folder / "trajectories"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation"

    def arm(self, name: str) -> Arm:
        """Paths of an arm."""
        return Arm(name, self.folder / "arms" / name)

    @property
    def arms(self) -> dict[str, Arm]:
        """All arms, the main one first."""
        return {name: self.arm(name) for name in self.config.arms}

    @cached_property
    def prompt_rows(self) -> list[dict[str, Any]]:
        """Rows of the prompt table."""
        open_artifact(self.prompts, "prompts", made_by="cropi collect")
        return read_table(self.prompts / "prompts.parquet", PROMPTS).to_pylist()

    @cached_property
    def train_prompts(self) -> dict[str, dict[str, Any]]:
        """Training prompts by id, in ascending order of id."""
        return {
            r["prompt_id"]: r for r in sorted(self.prompt_rows, key=lambda r: r["prompt_id"]) if r["set"] == "train"
        }


PACKAGES = ("cropi", "torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "numpy", "pyarrow")


def environment() -> dict[str, str]:
    """Versions and machine that decide a run's numbers, as far as they can be had without importing anything."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
    }


def _claim(config: Config) -> None:
    """Write the resolved config into a new folder; refuse a folder that was made with another one."""
    folder, path = config.folder, config.folder / "config.json"
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ArtifactError("exists and is not a run", where=str(folder), fix="choose another name= or run_dir=.")
        write_json(folder / "environment.json", environment())
        write_json(path, config.resolved())
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ArtifactError("is not JSON", where=str(path), fix=f"delete {folder} and run again.") from None
    changed = config_difference(before, config.resolved())
    if changed:
        raise ConfigError(
            "this run was started with another config: " + "; ".join(changed),
            where=str(folder),
            fix="take the change back, give the run another name (name=...), or delete the folder.",
        )
