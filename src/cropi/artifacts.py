"""Typed tables on disk, and the manifest that is written last.

An artifact is a folder that holds data files and a `manifest.json`. A folder without a manifest is unfinished; one with
a manifest is complete, and its files carry the checksums recorded there. That one rule gives resume and provenance.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from cropi import __version__
from cropi.errors import ArtifactError
from cropi.parallel import process_group

FORMAT_VERSION = 2
SEAL = "sha256"  # a key of sealed JSON: the checksum of all others
MANIFEST = "manifest.json"
BEGUN = "inputs.json"  # in an unfinished folder whose parts are kept: what they are made from
APPEAR_S = 120.0  # that a network file system may take to show a file of another node

# Status of a row. A row that enters a stage leaves it with one of these.
OK = "ok"
NO_SIGNAL = "no_signal"  # all rewards of the group are equal: its gradient is zero
TRUNCATED = "truncated"  # the completion ended at the length limit, without end-of-sequence
GOLD_UNPARSEABLE = "gold_unparseable"  # the recorded answer cannot be read by the verifier: excluded, never scored 0
NON_FINITE = "non_finite"  # the influence is not a finite number, because the prompt's own numbers are not
PROMPT_TOO_LONG = "prompt_too_long"  # prompt and completion would not fit into the policy's context: no trajectories
NOT_SAMPLED = "not_sampled"  # the strategy reads no trajectories
USABLE = frozenset({OK, NO_SIGNAL, NOT_SAMPLED})  # statuses of a prompt that can be trained on

PROMPTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("set", pa.string()),  # "train", "validation/NAME" or "test/NAME"
        ("source", pa.string()),
        ("messages", pa.string()),  # JSON: a string, or a list of chat messages
        ("answer", pa.string()),
        ("extra", pa.string()),  # JSON: an object with what else verifiers may ask for; null: nothing
    ]
)

TRAJECTORIES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("set", pa.string()),
        ("sample", pa.int32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("behaviour_logprobs", pa.list_(pa.float32())),
        ("completion", pa.string()),
        ("reward", pa.float64()),
        ("verdict", pa.string()),
        ("status", pa.string()),
    ]
)

REPRESENTATIONS = pa.schema(
    [
        ("set", pa.string()),  # "train" or "validation/NAME"
        ("prompt_id", pa.string()),
        ("representation", pa.list_(pa.float32())),
    ]
)

SELECTION = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("selected", pa.bool_()),
        ("rank", pa.int32()),  # 1 is best; null where the strategy could not rank the prompt
        ("score", pa.float64()),  # fused score
        ("scores", pa.map_(pa.string(), pa.float64())),  # influence by validation set
        ("pass_rate", pa.float64()),
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)

EVALUATION = pa.schema(
    [
        ("set", pa.string()),
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("step", pa.int32()),
        ("greedy", pa.float64()),  # 1 right, 0 wrong
        ("sampled", pa.float64()),  # mean over the sampled completions; null where none were asked for
        ("samples", pa.int32()),
        ("completion", pa.string()),  # the greedy one
        ("verdict", pa.string()),
    ]
)


CLIP_RANGE = 0.2  # the epsilon of PPO and GRPO, by which drift is reported


@dataclass(frozen=True)
class Manifest:
    """Kind of an artifact, its inputs, and the checksums of its files."""

    kind: str
    inputs: Mapping[str, Any]  # name -> identity of what it was made from; under `settings` the settings that made it
    counts: Mapping[str, int]  # rows by status
    files: Mapping[str, str]  # file name -> sha256
    details: Mapping[str, Any]
    version: int = FORMAT_VERSION
    cropi: str = __version__

    @property
    def identity(self) -> str:
        """SHA-256 over the kind and the content of all files."""
        return hashlib.sha256(json.dumps([self.kind, dict(sorted(self.files.items()))]).encode()).hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path. It replaces `path` if the block ends without an error, and is deleted otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with full_disk_named(path):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Raise ArtifactError, which names the file that the block writes, where the disk is full."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_full_disk(error):
            raise
        raise ArtifactError(
            "no space left on the disk; everything finished so far is kept",
            where=str(path),
            fix="free some space and run the same command again: it goes on where it stopped.",
        ) from None


def is_full_disk(error: BaseException | None) -> bool:
    """Whether a full disk caused an error: libraries wrap it in errors of their own, some without its number."""
    while error is not None:
        if getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT} or any(text in str(error) for text in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


_FULL = ("No space left", "unexpected pos", "PytorchStreamWriter failed writing")  # the latter are all that torch says


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step. NaN and infinities are refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, for `read_sealed`."""
    write_json(path, {**value, SEAL: _json_sha256(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote. ArtifactError if the file cannot be read or was changed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        whole = value.pop(SEAL, None) == _json_sha256(value)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise corrupt(path, f"cannot be read ({error})") from None
    if not whole:
        raise corrupt(path, "differs from its checksum, or another version of cropi wrote it")
    return dict(value)


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write a Parquet file in one step, with a checksum on every page."""
    table = pa.Table.from_pylist(list(rows), schema=schema)
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def write_batches(path: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
    """Write a Parquet file in one step, with one batch in memory at a time."""
    with (
        atomic_file(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as file,
    ):
        for batch in batches:
            file.write_batch(batch)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a Parquet file and hold it to its schema."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        if table.schema.names == schema.names:
            return table.cast(schema)
    except (OSError, pa.ArrowException) as error:
        raise corrupt(path, f"cannot be read as Parquet ({error})") from None
    raise corrupt(path, f"has the columns {table.schema.names}, not {schema.names}")


def finish(
    folder: Path,
    kind: str,
    *,
    inputs: Mapping[str, Any],
    counts: Mapping[str, int],
    details: Mapping[str, Any] | None = None,
    known: Mapping[str, str] | None = None,
    names: Iterable[str] | None = None,
) -> Manifest:
    """Write the manifest of a folder whose files are complete. From then on the artifact is finished.

    `known`: checksums that are known already. `names`: the files of the artifact; by default all in the folder.
    """
    known = known or {}
    if names is None:
        found = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".part"))
        names = [str(path.relative_to(folder)) for path in found if path.name not in {MANIFEST, BEGUN}]
    files = {name: known.get(name) or file_sha256(folder / name) for name in names}
    manifest = Manifest(kind, dict(inputs), dict(counts), files, dict(details or {}))
    write_sealed(folder / MANIFEST, vars(manifest))
    return manifest


def is_finished(folder: Path) -> bool:
    """Whether the artifact's manifest has been written."""
    return (folder / MANIFEST).is_file()


def open_artifact(folder: Path, kind: str, *, made_by: str) -> Manifest:
    """Check an artifact's manifest and the checksums of all its files; `made_by` is the command that makes it."""
    manifest = read_manifest(folder, kind, made_by=made_by)
    for name, checksum in manifest.files.items():
        check_file(folder / name, checksum)
    return manifest


def read_manifest(folder: Path, kind: str, *, made_by: str) -> Manifest:
    """Read an artifact's manifest without checking its files."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"there is no finished {kind} artifact", where=str(folder), fix=f"run `{made_by}` first.")
    values = read_sealed(path)
    found = values.get("kind"), values.get("version")
    if found != (kind, FORMAT_VERSION):
        raise corrupt(path, f"describes {found[0]!r} version {found[1]}, not {kind!r} {FORMAT_VERSION}")
    return Manifest(**values)


def check_file(path: Path, checksum: str, fix: str | None = None) -> None:
    """Raise ArtifactError if a file is missing or does not have the checksum."""
    if not path.is_file():
        raise corrupt(path, "is missing", fix)
    if file_sha256(path) != checksum:
        raise corrupt(path, "differs from the checksum in its manifest", fix)


def corrupt(path: Path, what: str, fix: str | None = None) -> ArtifactError:
    """Return the error for a damaged file. It names what to delete: the file, or the artifact that holds it."""
    part = path.parent if is_finished(path.parent) else path
    return ArtifactError(
        what, where=str(path), fix=fix or f"delete {part} and go on with `cropi run`: it is made anew."
    )


def file_sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build(
    folder: Path,
    kind: str,
    make: Callable[[Path], tuple[Mapping[str, int], Mapping[str, Any]]],
    *,
    inputs: Mapping[str, Any],
    made_by: str,
    keep_parts: bool = False,
    shared: bool = False,
) -> Manifest:
    """Open the artifact in `folder` if it is finished, and make it otherwise. Refuse one made from other inputs.

    `make` fills the folder and returns (counts, details). With `keep_parts` it continues from the files that an
    interruption left; otherwise the folder is emptied first. Rank 0 alone calls `make`, unless it is `shared`: then
    every rank calls it and writes files of its own.
    """
    ranks = process_group()
    known = ranks.from_main(lambda: _begin(folder, kind, inputs, made_by, keep_parts))
    if known is not None:
        return Manifest(**known)
    counts, details = make(folder) if shared or ranks.is_main else ({}, {})
    ranks.barrier()
    manifest = Manifest(
        **ranks.from_main(lambda: vars(finish(folder, kind, inputs=inputs, counts=counts, details=details)))
    )
    if not ranks.is_main:
        wait_for_files(folder / name for name in (MANIFEST, *manifest.files))
    return manifest


def _begin(folder: Path, kind: str, inputs: Mapping[str, Any], made_by: str, keep_parts: bool) -> dict[str, Any] | None:
    """Return the manifest of a finished artifact. Otherwise prepare its folder and return None."""
    if is_finished(folder):
        manifest = open_artifact(folder, kind, made_by=made_by)
        stale = sorted(key for key in {*inputs, *manifest.inputs} if inputs.get(key) != manifest.inputs.get(key))
        if stale:
            raise ArtifactError(
                f"was made from another {', '.join(stale)}",
                where=str(folder),
                fix=f"delete {folder} to make it anew, or give the run another name (name=...).",
            )
        return vars(manifest)
    begun = folder / BEGUN
    if folder.exists() and not (keep_parts and begun.is_file() and read_sealed(begun) == {"inputs": inputs}):
        remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if keep_parts:
        write_sealed(begun, {"inputs": inputs})
    return None


def remove(folder: Path) -> None:
    """Delete a folder. ArtifactError for a symbolic link: what it points to is not the run's."""
    if folder.is_symlink():
        raise ArtifactError(
            "is a symbolic link, and what it points to is not finished", where=str(folder), fix="remove the link."
        )
    shutil.rmtree(folder)


def remove_parts(folder: Path) -> None:
    """Delete files that interrupted processes of this machine were writing, anywhere in a folder."""
    for path in folder.rglob(".*.part"):
        writer = path.name.split(".")[-2]
        if not (writer.isdigit() and psutil.pid_exists(int(writer))):
            path.unlink(missing_ok=True)


def wait_for_files(paths: Iterable[Path]) -> None:
    """Wait for files that other processes have written: a network file system may show them late."""
    deadline = time.monotonic() + APPEAR_S
    for path in paths:
        while not path.is_file():
            os.listdir(path.parent)  # noqa: PTH208 - makes a network file system look again
            if time.monotonic() > deadline:
                raise ArtifactError(
                    f"was written by another process and has not come up here for {APPEAR_S:g} seconds",
                    where=str(path),
                    fix="put run_dir on a file system that all nodes share.",
                )
            time.sleep(0.1)


def count_status(statuses: Iterable[str]) -> dict[str, int]:
    """Rows by status, in alphabetical order."""
    return dict(sorted(Counter(statuses).items()))
