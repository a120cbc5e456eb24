"""The folder of a run: its paths, and the lock that claims it for one config. Free of torch.

config.json  environment.json  ledger.jsonl  summary.json  report.html  report.md
prompts/  representations/  trajectories/                   before training
scores/stage-NNN/  selections/stage-NNN/                    made at the start of a stage
fresh/  fresh-validation/  reused/  screened/  features/    by stage, where the config asks for them
rollouts/  checkpoints/  evaluations/  steps.jsonl  metrics.jsonl  rewards.jsonl
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
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cropi.artifacts import (
    BEGUN,
    EVALUATION,
    MANIFEST,
    PROMPTS,
    check_file,
    check_streams,
    corrupt,
    cut_jsonl,
    finish,
    is_finished,
    open_artifact,
    read_manifest,
    read_sealed,
    read_table,
    remove_parts,
    wait_for_files,
    write_json,
    write_sealed,
    write_table,
)
from cropi.config import Config, config_difference, deciding
from cropi.errors import ArtifactError, ConfigError
from cropi.world import ALONE, World


@dataclass(frozen=True)
class StagePaths:
    """Paths of what the stages make, in a run's folder or in that of a checkpoint from outside."""

    folder: Path

    def scores(self, stage: int) -> Path:
        return self._of("scores", stage)

    def selection(self, stage: int) -> Path:
        return self._of("selections", stage)

    def fresh(self, stage: int) -> Path:
        """Trajectories of the training pool, sampled again at the start of a stage."""
        return self._of("fresh", stage)

    def fresh_validation(self, stage: int) -> Path:
        """Trajectories of the validation sets, sampled again at the start of a stage."""
        return self._of("fresh-validation", stage)

    def screened(self, stage: int) -> Path:
        """A few trajectories of the prompts that a stage would choose, by the policy at its start."""
        return self._of("screened", stage)

    def reused(self, stage: int) -> Path:
        """The newest groups that training sampled in the stage before."""
        return self._of("reused", stage)

    @property
    def imported(self) -> Path:
        """Trajectories from another trainer's rollouts."""
        return self.folder / "imported"

    @property
    def rollouts(self) -> Path:
        """Completions that training samples, a file per generation batch: see `training.rollouts`."""
        return self.folder / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def evaluations(self) -> Path:
        return self.folder / "evaluations"

    @property
    def rewards(self) -> Path:
        return self.folder / "rewards.jsonl"

    @property
    def steps(self) -> Path:
        return self.folder / "steps.jsonl"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.jsonl"

    def _of(self, name: str, stage: int) -> Path:
        return self.folder / name / f"stage-{stage:03}"

    def forget_training(self) -> None:
        """Delete what the stages have made of an earlier training."""
        for name in (*BY_STAGE, "imported", "rollouts", "checkpoints", "evaluations"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for stream in (self.rewards, self.steps, self.metrics):
            cut_jsonl(stream, lambda _: False)


def checkpoint_step(path: Path) -> int | None:
    """The optimiser step of a checkpoint of ours; None for whatever else lies beside it, and for links."""
    match = re.fullmatch(r"checkpoint-([1-9][0-9]{0,17})", path.name)
    return int(match[1]) if match and path.is_dir() and not path.is_symlink() else None


def checkpoints(folder: Path, last: int) -> dict[int, Path]:
    """The checkpoints of ours in a folder, finished or not, by steps up to the last one of the training."""
    found = {checkpoint_step(path): path for path in folder.glob("checkpoint-*")}
    return {step: path for step, path in found.items() if step is not None and step <= last}


def evaluation_files(folder: Path, *, all_there: bool = False) -> dict[int, Path]:
    """Tables of finished evaluations by optimiser step, in ascending order; step 0 is the base policy.

    ArtifactError where one is damaged, and with `all_there` where one is missing.
    """
    known = read_manifest(folder, EVALUATED, made_by="cropi run").files if is_finished(folder) else {}
    again = "go on with `cropi run`: it is measured again, if the checkpoint of its step is still there."
    for name, checksum in known.items():
        if all_there or (folder / name).is_file():
            check_file(folder / name, checksum, f"delete {folder / name} and {again}")
    found = {_evaluated_at(path.name): path for path in folder.glob("step-*") if STEP_FILE.fullmatch(path.name)}
    for path in found.values():
        if all_there and path.name not in known:
            raise corrupt(path, "is not in its manifest", again)
    return {step: path for step, path in sorted(found.items()) if path.name in known}


def keep_evaluation(folder: Path, step: int, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Write the table of an evaluation, and the manifest of all in the folder."""
    path = folder / f"step-{step:06}.parquet"
    write_table(path, rows, EVALUATION)
    before = read_manifest(folder, EVALUATED, made_by="cropi run") if is_finished(folder) else None
    known = {} if before is None else {name: found for name, found in before.files.items() if name != path.name}
    inputs = {"settings": {**({} if before is None else before.inputs["settings"]), **settings}}
    finish(folder, EVALUATED, inputs=inputs, counts={}, known=known, names=sorted([*known, path.name]))


def forget_evaluations(folder: Path, step: int) -> None:
    """Drop evaluations beyond the step that an interrupted training goes on from."""
    if is_finished(folder):
        before = read_manifest(folder, EVALUATED, made_by="cropi run")
        kept = {name: checksum for name, checksum in before.files.items() if _evaluated_at(name) <= step}
        finish(folder, EVALUATED, inputs=before.inputs, counts={}, known=kept, names=kept)
    for path in folder.glob("step-*.parquet"):
        if STEP_FILE.fullmatch(path.name) and _evaluated_at(path.name) > step:
            path.unlink()


def _evaluated_at(name: str) -> int:
    return int(name.removeprefix("step-").removesuffix(".parquet"))


class TrainPrompts(Mapping[str, dict[str, Any]]):
    """Training prompts by id, in ascending order of id. Rows are made from columns when they are asked for."""

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


class RunFolder:
    """The folder of a run. Readers write nothing; `lock` claims it for one config, by the first process for all."""

    def __init__(self, config: Config, world: World = ALONE) -> None:
        self.config, self.folder, self.world = config, config.folder, world
        self.stages = StagePaths(config.folder)
        world.from_main(self._check_claim)

    def lock(self) -> None:
        """Keep others from writing to this run until this process ends, however it ends, or drops this object.

        Writes the resolved config into a new folder, once it is locked: nobody else's run is touched.
        """
        self.world.from_main(self._lock)
        if not self.world.is_main:
            wait_for_files([self.folder / CONFIG])

    def _lock(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / LOCK, os.O_CREAT | os.O_WRONLY, 0o644)
        except OSError as error:
            raise _unusable(self.folder, error) from None
        self._unlock = weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ArtifactError(
                "another process is working on this run", where=str(self.folder), fix="wait for it, or stop it."
            ) from None
        remove_parts(self.folder)
        self._check_claim()  # another process may have claimed it in the meantime
        check_streams(self.folder, *self.folder.glob(f"{OUTSIDE}/*"))
        if not (self.folder / CONFIG).is_file() or not self._holds_anything():
            write_json(self.folder / CONFIG, self.config.resolved())
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
        found = deciding(self.config.resolved())
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
        changed = [] if not known else config_difference(deciding(before), deciding(self.config.resolved()))
        if changed and self._holds_anything():
            raise ConfigError(
                f"this run was started with another config: {_shown(changed)}",
                where=str(self.folder),
                fix=f"name its own config ({path}) instead of a recipe, or give the new run another name (name=...).",
            )
        self._check_settings()

    def _check_settings(self) -> None:
        """Refuse settings that differ from those of a finished artifact: the config may have been edited."""
        for folder, inputs in self._made():
            if "settings" in inputs:
                before, now = inputs["settings"], self.settings()
                changed = config_difference(before, {key: now.get(key) for key in before})
                if changed:
                    raise ConfigError(
                        f"was made with other settings: {_shown(changed)}",
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

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts"

    @property
    def trajectories(self) -> Path:
        return self.folder / "trajectories"

    @property
    def representations(self) -> Path:
        """Hidden states of the base policy for every prompt."""
        return self.folder / "representations"

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


EVALUATED = "evaluation"  # kind of artifact
STEP_FILE = re.compile(r"step-(\d+)\.parquet")
BEFORE_TRAINING = ("prompts", "representations", "trajectories")
BY_STAGE = ("scores", "features", "selections", "fresh", "fresh-validation", "screened", "reused")
OUTSIDE = "other-checkpoints"
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
LOCK = "lock"
BLOCK_ROWS = 1 << 14
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


def require_writable(folder: Path) -> None:
    """ArtifactError where nothing can be written to a folder, or to the one that it is to be made in."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise _unusable(folder, f"{there} cannot be written to")


def _unusable(folder: Path, problem: object) -> ArtifactError:
    return ArtifactError(f"cannot be used ({problem})", where=str(folder), fix="choose another run_dir=.")


def _shown(changed: list[str]) -> str:
    """The first of many changes."""
    more = f"; and {len(changed) - SHOWN_CHANGES} more" if len(changed) > SHOWN_CHANGES else ""
    return "; ".join(changed[:SHOWN_CHANGES]) + more
