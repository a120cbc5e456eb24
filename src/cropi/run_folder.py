"""The folder of a run: its paths, and the lock that claims it for one config. Free of torch.

config.json  environment.json  ledger.jsonl  summary.json  report.html  report.md
prompts/  representations/  trajectories/                   before training
scores/stage-NNN/  selections/stage-NNN/                    made at the start of a stage
beliefs/stage-NNN/                                          made at its end, where prompts are chosen by influence
imported/                                                   from another trainer, by `cropi import`
checkpoints/  evaluations/  steps.jsonl  metrics.jsonl  rewards.jsonl  choices.jsonl
other-checkpoints/NAME-HASH/  (scores, selections and evaluations of checkpoints from outside)
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import weakref
from collections.abc import Iterator
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cropi.artifacts import (
    BEGUN,
    MANIFEST,
    PROMPTS,
    open_artifact,
    read_sealed,
    read_table,
    remove_parts,
    wait_for_files,
    write_json,
    write_sealed,
)
from cropi.config import Config, config_difference, deciding
from cropi.console import say
from cropi.errors import ArtifactError, ConfigError
from cropi.parallel import process_group
from cropi.rewards.verifiers.python_function import SCRIPT_REWARDS
from cropi.run_tables import TrainPrompts
from cropi.streams import check_streams


class StagePaths:
    """Paths of what the stages make, in a run's folder or in that of a checkpoint from outside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.imported = folder / "imported"  # trajectories from another trainer's rollouts
        self.checkpoints, self.evaluations = folder / "checkpoints", folder / "evaluations"
        self.choices = folder / "choices.jsonl"  # of every generation batch, where a strategy chooses them one by one
        self.rewards, self.steps = folder / "rewards.jsonl", folder / "steps.jsonl"
        self.metrics, self.ledger = folder / "metrics.jsonl", folder / "ledger.jsonl"

    def scores(self, stage: int) -> Path:
        return self._of("scores", stage)

    def selection(self, stage: int) -> Path:
        return self._of("selections", stage)

    def beliefs(self, stage: int) -> Path:
        """Beliefs about the pool at the end of a stage, where influence is read while training."""
        return self._of("beliefs", stage)

    def _of(self, name: str, stage: int) -> Path:
        return self.folder / name / f"stage-{stage:03}"


def checkpoint_step(path: Path) -> int | None:
    """The optimiser step of a checkpoint of ours; None for whatever else lies beside it, and for links."""
    match = re.fullmatch(r"checkpoint-([1-9][0-9]{0,17})", path.name)
    return int(match[1]) if match and path.is_dir() and not path.is_symlink() else None


def checkpoints(folder: Path, last: int) -> dict[int, Path]:
    """The checkpoints of ours in a folder, finished or not, by steps up to the last one of the training."""
    found = {checkpoint_step(path): path for path in folder.glob("checkpoint-*")}
    return {step: path for step, path in found.items() if step is not None and step <= last}


class RunFolder:
    """The folder of a run. Readers write nothing; `lock` claims it for one config, by the first process for all."""

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, config.folder
        self.stages = StagePaths(config.folder)
        self.prompts, self.trajectories = self.folder / "prompts", self.folder / "trajectories"
        self.representations = self.folder / "representations"  # hidden states of the base policy for every prompt
        self._grown_from: int | None = None  # stages that the run had, where it gets more
        process_group().from_main(self._check_claim)

    def lock(self) -> None:
        """Keep others from writing to this run until this process ends, however it ends, or drops this object.

        Writes the resolved config into a new folder, once it is locked: nobody else's run is touched.
        """
        process_group().from_main(self._lock)
        if not process_group().is_main:
            wait_for_files([self.folder / CONFIG])

    def _lock(self) -> None:
        self._unlock = weakref.finalize(self, os.close, _locked(self.folder))
        remove_parts(self.folder)
        self._check_claim()  # another process may have claimed it in the meantime
        check_streams(self.folder, *self.folder.glob(f"{OUTSIDE}/*"))
        known = (self.folder / CONFIG).is_file() and self._holds_anything()
        if not known or self._grown_from or self.config.is_of_script:  # a script may train for longer
            write_json(self.folder / CONFIG, self.config.resolved())
        if self._grown_from:
            stages = self.config.train.stages
            say(f"{self.folder} grows from {self._grown_from} to {stages} stages, with the learning rates of {stages}")
        if not (self.folder / ENVIRONMENT).is_file():
            write_sealed(self.folder / ENVIRONMENT, environment())
        read_sealed(self.folder / ENVIRONMENT)

    def unlock(self) -> None:
        """Let other processes write to this run."""
        self._unlock()

    def outside(self, checkpoint: Path, identity: str) -> StagePaths:
        """Paths for a checkpoint from outside the run, by its name and content."""
        return StagePaths(self.folder / OUTSIDE / f"{checkpoint.resolve().name}-{identity[:12]}")

    def settings(self, *tables: str) -> dict[str, Any]:
        """The settings behind an artifact, for its manifest: some tables of the config, or all."""
        found = _lasting(self.config.resolved())
        return {name: found[name] for name in tables or found}

    def _check_claim(self) -> None:
        """Refuse a folder that is no run, or that holds artifacts made with other settings.

        The folder's own path does not count: a run may be moved.
        """
        path = self.folder / CONFIG
        try:
            known = path.is_file()
            before: Any = json.loads(path.read_text(encoding="utf-8")) if known else None
            files = list(self.folder.iterdir()) if self.folder.is_dir() else []
        except OSError as error:
            raise _unusable(self.folder, error) from None
        except (ValueError, RecursionError):
            raise ArtifactError("is not JSON", where=str(path), fix=f"delete {self.folder} and run again.") from None
        if known and not isinstance(before, dict):
            raise ArtifactError("holds no config", where=str(path), fix=f"delete {self.folder} and run again.")
        others = [file for file in files if file.name != LOCK and file.suffix != ".part"]
        if not known and (others or (self.folder.exists() and not self.folder.is_dir())):
            raise ArtifactError(
                "exists and is not a run", where=str(self.folder), fix="choose another name= or run_dir=."
            )
        changed = [] if not known else config_difference(_lasting(before), _lasting(self.config.resolved()))
        stages = self.config.train.stages
        grows = known and 0 < _stages(before) < stages and self._holds_anything()
        self._grown_from = _stages(before) if grows else None
        if known and _stages(before) > stages:
            changed.append(f"train.stages: {_stages(before)} -> {stages}")
        if changed and self._holds_anything():
            raise ConfigError(
                f"this run was started with another config: {first_changes(changed)}",
                where=str(self.folder),
                fix=f"name its own config ({path}) instead of a recipe, or give the new run another name (name=...).",
            )
        self._check_settings()

    def _check_settings(self) -> None:
        """Refuse settings that differ from those of a finished artifact: the config may have been edited."""
        for folder, inputs in self._made():
            if "settings" in inputs:
                before, now = _lasting(inputs["settings"]), self.settings()
                changed = config_difference(before, {key: now.get(key) for key in before})
                if changed:
                    raise ConfigError(
                        f"was made with other settings: {first_changes(changed)}",
                        where=str(folder),
                        fix=f"change them back in {self.folder / CONFIG}, or give the new run another name (name=...).",
                    )

    def _made(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Artifacts that are finished or begun, each with the inputs that it was made from."""
        by_stage = [f"{name}/stage-*" for name in BY_STAGE]
        inside = [*BEFORE_TRAINING, "imported", "evaluations", "checkpoints/*", *by_stage]
        for place in [*inside, *(f"{OUTSIDE}/*/{name}" for name in inside)]:
            for folder in sorted(self.folder.glob(place)):
                own = folder.parent.name != "checkpoints" or checkpoint_step(folder) is not None
                found = [folder / name for name in (MANIFEST, BEGUN) if (folder / name).is_file()]
                if own and found:
                    yield folder, read_sealed(found[0])["inputs"]

    def _holds_anything(self) -> bool:
        """Whether the folder holds any artifact."""
        names = (path.name for path in self.folder.rglob("*"))
        return any(name == MANIFEST or name.startswith("part-") for name in names)

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

    @property
    def validation_prompts(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of the prompt table by validation set, in order of its name."""
        rows = self.held_out("validation")
        names = sorted(self.config.prompts.validation)
        return {name: [row for row in rows if row["set"] == f"validation/{name}"] for name in names}

    @cached_property
    def train_prompts(self) -> TrainPrompts:
        """Training prompts by id, in ascending order of id."""
        return TrainPrompts(self._prompt_table.filter(pc.equal(self._prompt_table.column("set"), "train")))


BEFORE_TRAINING = ("prompts", "representations", "trajectories")
BY_STAGE = ("scores", "selections", "beliefs")
OUTSIDE = "other-checkpoints"
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
LOCK = "lock"
SHOWN_CHANGES = 5
PACKAGES = ("cropi", "torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "numpy", "pyarrow")


def environment() -> dict[str, str]:
    """Versions and machine, as far as they can be had without importing anything."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
    }


def _locked(folder: Path) -> int:
    """Lock a folder; returns the open file that holds the lock. ArtifactError where another process has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_CREAT | os.O_WRONLY, 0o644)
    except OSError as error:
        raise _unusable(folder, error) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise ArtifactError(
            "another process is working on this run", where=str(folder), fix="wait for it, or stop it."
        ) from None
    return handle


def discard(folder: Path) -> None:
    """Delete a run, unless another process works on it."""
    handle = _locked(folder)
    shutil.rmtree(folder)
    os.close(handle)


def require_script_folder(folder: Path) -> None:
    """ConfigError for a folder that holds anything but the curriculum of a TRL script, which would be deleted."""
    try:
        values = json.loads((folder / "run" / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        values = None
    known = isinstance(values, dict) and _is_scripted(values)
    if not known and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("it holds files that are no curriculum's", where=str(folder), fix="name a new folder.")


def nearest_existing(folder: Path) -> Path:
    """A folder, or the one that it is to be made in."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def require_writable(folder: Path) -> None:
    """ArtifactError where nothing can be written to a folder, or to the one that it is to be made in."""
    there = nearest_existing(folder)
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise _unusable(folder, f"{there} cannot be written to")


def _unusable(folder: Path, problem: object) -> ArtifactError:
    return ArtifactError(f"cannot be used ({problem})", where=str(folder), fix="choose another run_dir=.")


def _lasting(resolved: dict[str, Any]) -> dict[str, Any]:
    """The settings that cannot change during a run: those that decide, but for its length, which may grow.

    A run grows by stages, and a TRL script by steps.
    """
    found = deciding(resolved)
    train = found.get("train")
    length = {"stages", "steps_per_stage"} if _is_scripted(found) else {"stages"}
    return found | ({"train": {k: v for k, v in train.items() if k not in length}} if isinstance(train, dict) else {})


def _is_scripted(resolved: dict[str, Any]) -> bool:
    verifier = resolved.get("verifier")
    return isinstance(verifier, dict) and verifier.get("path") == SCRIPT_REWARDS


def _stages(resolved: dict[str, Any]) -> int:
    train = resolved.get("train")
    stages = train.get("stages") if isinstance(train, dict) else None
    return stages if isinstance(stages, int) else 0


def first_changes(changed: list[str]) -> str:
    """The first of many changes, and the number of the others."""
    more = f"; and {len(changed) - SHOWN_CHANGES} more" if len(changed) > SHOWN_CHANGES else ""
    return "; ".join(changed[:SHOWN_CHANGES]) + more
