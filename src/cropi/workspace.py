"""The folder of a run: where everything lies, and whose it is. Free of torch.

config.json  environment.json  ledger.jsonl  summary.json  report.html  report.md
ledger-RANK.jsonl (of further processes)
prompts/  representations/  trajectories/  evaluation/ (the base policy)
checkpoints/NAME-HASH/  (scores, selections, evaluations of checkpoints from elsewhere)
arms/ARM/  stages/NNN/{rollouts,fresh,scores,selection}/  evaluation/  checkpoints/  rollouts/
           steps.jsonl  metrics.jsonl  rewards.jsonl
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import weakref
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cropi.artifacts import PROMPTS, open_artifact, read_table, wait_for_files, write_json
from cropi.config import Config, config_difference
from cropi.errors import ArtifactError, ConfigError
from cropi.ledger import Ledger
from cropi.world import ALONE, World


@dataclass(frozen=True)
class Arm:
    """Paths of one strategy's training."""

    name: str
    folder: Path

    def scores(self, stage: int) -> Path:
        return self.folder / "stages" / f"{stage:03}" / "scores"

    def features(self, stage: int) -> Path:
        return self.folder / "stages" / f"{stage:03}" / "features"

    def selection(self, stage: int) -> Path:
        return self.folder / "stages" / f"{stage:03}" / "selection"

    def fresh(self, stage: int) -> Path:
        """Trajectories sampled anew at the start of a stage."""
        return self.folder / "stages" / f"{stage:03}" / "fresh"

    def screened(self, stage: int) -> Path:
        """A few trajectories of the prompts that a stage would choose, by the policy at its start."""
        return self.folder / "stages" / f"{stage:03}" / "screened"

    def fresh_validation(self, stage: int) -> Path:
        """The same of the validation sets."""
        return self.folder / "stages" / f"{stage:03}" / "fresh_validation"

    def reused(self, stage: int) -> Path:
        """The newest groups that training sampled in the stage before."""
        return self.folder / "stages" / f"{stage:03}" / "rollouts"

    @property
    def imported(self) -> Path:
        """Trajectories that another trainer's rollouts hold."""
        return self.folder / "imported"

    @property
    def rollouts(self) -> Path:
        """What training samples, a file per generation batch: see `rollout_file`."""
        return self.folder / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation"

    @property
    def rewards(self) -> Path:
        return self.folder / "rewards.jsonl"


def rollout_file(folder: Path, step: int, batch: int, rank: int = 0) -> Path:
    """The file of a process's part of a generation batch of training: by the optimiser step it was sampled at, its
    place in the step, and the process if it is not the first."""
    return folder / f"part-{step:06}-{batch:03}{f'-{rank:03}' if rank else ''}.parquet"


def rollout_files(folder: Path) -> dict[tuple[int, int, int], Path]:
    """The files of `rollout_file` that are there by (step, batch, process), oldest first."""
    found = {}
    for path in folder.glob("part-*-*.parquet"):
        step, batch, *rank = map(int, path.stem.split("-")[1:])
        found[step, batch, rank[0] if rank else 0] = path
    return dict(sorted(found.items()))


class TrainPrompts(Mapping[str, dict[str, Any]]):
    """Training prompts by id, in ascending order of id: columns, of which a row is made when it is asked for."""

    def __init__(self, table: pa.Table) -> None:
        wide = [pa.field(f.name, pa.large_string() if f.type == pa.string() else f.type) for f in table.schema]
        self._table = table.cast(pa.schema(wide)).sort_by("prompt_id").combine_chunks()
        self._ids: list[str] = self._table.column("prompt_id").to_pylist()

    def __getitem__(self, prompt_id: str) -> dict[str, Any]:
        place = bisect_left(self._ids, prompt_id)
        if place == len(self._ids) or self._ids[place] != prompt_id:
            raise KeyError(prompt_id)
        return self._table.slice(place, 1).to_pylist()[0]

    def __contains__(self, prompt_id: object) -> bool:
        place = bisect_left(self._ids, prompt_id) if isinstance(prompt_id, str) else len(self._ids)
        return place < len(self._ids) and self._ids[place] == prompt_id

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, a block of them in memory at a time."""
        for start in range(0, len(self._ids), BLOCK_ROWS):
            yield from self._table.slice(start, BLOCK_ROWS).to_pylist()

    def column(self, name: str) -> list[Any]:
        """One column, in the order of the ids."""
        return self._table.column(name).to_pylist()


class Workspace:
    """A run's folder, claimed for one config. Of several processes the first claims and locks it for all."""

    def lock(self) -> None:
        """Keep others from writing to this run until this process ends, however it ends, or forgets the workspace."""
        self.world.from_main(self._lock)

    def _lock(self) -> None:
        handle = os.open(self.folder / "lock", os.O_CREAT | os.O_WRONLY, 0o644)
        self._unlock = weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ArtifactError(
                "another process is working on this run", where=str(self.folder), fix="wait for it, or stop it."
            ) from None

    def unlock(self) -> None:
        """Let other processes write to this run."""
        self._unlock()

    def foreign(self, checkpoint: Path, identity: str) -> Arm:
        """Where scores, selections and evaluations of a checkpoint from elsewhere go: by its name and content."""
        name = self.config.select.strategy.arm
        return Arm(name, self.folder / "checkpoints" / f"{checkpoint.resolve().name}-{identity[:12]}")

    def __init__(self, config: Config, world: World = ALONE) -> None:
        self.config, self.folder, self.world = config, config.folder, world
        self.ledger = Ledger(self.folder / "ledger.jsonl", world)
        world.from_main(lambda: _claim(config))
        if not world.is_main:
            wait_for_files([self.folder / "config.json"])

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts"

    @property
    def trajectories(self) -> Path:
        return self.folder / "trajectories"

    @property
    def representations(self) -> Path:
        """Where the base policy sees every prompt."""
        return self.folder / "representations"

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
    def _prompt_table(self) -> pa.Table:
        open_artifact(self.prompts, "prompts", made_by="cropi collect")
        return read_table(self.prompts / "prompts.parquet", PROMPTS)

    @cached_property
    def prompt_rows(self) -> list[dict[str, Any]]:
        """Rows of the prompt table."""
        return self._prompt_table.to_pylist()

    def held_out(self, role: str) -> list[dict[str, Any]]:
        """Rows of the prompt table of a role: `validation` or `test`."""
        return self._prompt_table.filter(pc.starts_with(self._prompt_table.column("set"), f"{role}/")).to_pylist()

    @cached_property
    def train_prompts(self) -> TrainPrompts:
        """Training prompts by id, in ascending order of id."""
        return TrainPrompts(self._prompt_table.filter(pc.equal(self._prompt_table.column("set"), "train")))


BLOCK_ROWS = 1 << 14
SHOWN_CHANGES = 5
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


def require_claimable(config: Config) -> None:
    """What `_claim` would refuse, without writing anything; also a place where nothing can be written."""
    folder, path = config.folder, config.folder / "config.json"
    try:
        if path.is_file():
            _refuse_another(config, json.loads(path.read_text(encoding="utf-8")))
        elif folder.exists() and (not folder.is_dir() or any(p.suffix != ".part" for p in folder.iterdir())):
            raise ArtifactError("exists and is not a run", where=str(folder), fix="choose another name= or run_dir=.")
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        problem = "" if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written to"
    except OSError as error:
        problem = str(error)
    except (ValueError, RecursionError):
        raise ArtifactError("is not JSON", where=str(path), fix=f"delete {folder} and run again.") from None
    if problem:
        raise ArtifactError(f"cannot be used ({problem})", where=str(folder), fix="choose another run_dir=.")


def _claim(config: Config) -> None:
    """Write the resolved config into a new folder; refuse a folder in which something was made with another one.

    Where the folder lies is not part of what was claimed: a run may be moved.
    """
    folder, path = config.folder, config.folder / "config.json"
    try:
        if not path.is_file():
            if folder.exists() and (not folder.is_dir() or any(p.suffix != ".part" for p in folder.iterdir())):
                raise ArtifactError(
                    "exists and is not a run", where=str(folder), fix="choose another name= or run_dir=."
                )
            write_json(path, config.resolved())
        if not (folder / "environment.json").is_file():
            write_json(folder / "environment.json", environment())
        before = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"cannot be used ({error})", where=str(folder), fix="choose another run_dir=.") from None
    except (ValueError, RecursionError):
        raise ArtifactError("is not JSON", where=str(path), fix=f"delete {folder} and run again.") from None
    if _refuse_another(config, before):
        write_json(path, config.resolved())  # a run that was refused before it made anything starts over


def _refuse_another(config: Config, before: Any) -> bool:
    """Whether a folder was claimed with another config. ConfigError where something was made with it."""
    folder = config.folder
    if not isinstance(before, dict):
        raise ArtifactError("holds no config", where=str(folder / "config.json"), fix=f"delete {folder} and run again.")
    changed = config_difference(before | {"run_dir": ""}, config.resolved() | {"run_dir": ""})
    if changed and _holds_anything(folder):
        more = f"; and {len(changed) - SHOWN_CHANGES} more" if len(changed) > SHOWN_CHANGES else ""
        raise ConfigError(
            "this run was started with another config: " + "; ".join(changed[:SHOWN_CHANGES]) + more,
            where=str(folder),
            fix=f"name its own config ({folder / 'config.json'}) instead of a recipe, or give the new run another name "
            "(name=...).",
        )
    return bool(changed)


def _holds_anything(folder: Path) -> bool:
    """Whether some stage has left something in a run's folder."""
    return any(path.name == "manifest.json" or path.name.startswith("part-") for path in folder.rglob("*"))
