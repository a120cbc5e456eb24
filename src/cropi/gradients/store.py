"""The feature store: gradient features of all training prompts of a stage, on disk, written in shards.

A store is an artifact of kind `features`: `features.bin` (N rows of `dim` numbers, row-major, little-endian, no more),
`rows.parquet` (one row per prompt, in the same order), `directions.safetensors` (U of the structured mask by parameter
name) and `manifest.json`, written last. An unfinished one holds `features.bin.part`, and one record per durable shard.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cropi import artifacts
from cropi.errors import ArtifactError
from cropi.functional.influence import influence

KIND = "features"
BLOCK = 64  # rows in memory at once while reading, 20 bytes a number; larger blocks outgrow caches and are slower

FEATURE_ROWS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("status", pa.string()),
        ("norm", pa.float64()),  # of the feature before it was rounded to the store's dtype
        ("ratio_ess", pa.float64()),
        ("clip_share", pa.float64()),
        ("kl", pa.float64()),
        ("tokens", pa.int64()),
    ]
)
_RECORD = FEATURE_ROWS.append(pa.field("sha256", pa.string()))  # of the shard's bytes, the same in every row
DIRECTIONS = "directions.safetensors"
_DIGEST = "sha256"  # in the metadata of that file
_DATA, _BEGUN = "features.bin", "begun.json.part"

# Numbers travel as the integers of their bit patterns: NumPy has no bfloat16.
_FORMATS = {"bfloat16": (torch.bfloat16, torch.int16, "<i2"), "float32": (torch.float32, torch.int32, "<i4")}


@dataclass(frozen=True)
class StoreIdentity:
    """What features were made from, and how. Two sets of features may be compared only where all of it is equal."""

    projection: str  # SparseProjection.identity
    directions: str  # directions_digest of the structured mask's U; empty for the uniform mask
    policy: str
    tokenizer: str
    normalizer: str
    max_completion_length: int
    temperature: float
    advantage_std: bool
    correction: str
    clip: float
    prefix_cap: float
    baseline: str
    trajectories: str
    dtype: Literal["bfloat16", "float32"]
    dim: int

    def inputs(self) -> dict[str, str]:
        """As a manifest records it."""
        return {name: str(value) for name, value in {**asdict(self), "temperature": float(self.temperature)}.items()}


def directions_digest(directions: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of names; empty where there are none."""
    digest = hashlib.sha256()
    for name, tensor in sorted(directions.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if directions else ""


def stored_directions(folder: Path) -> dict[str, Tensor]:
    """U by parameter name, of a store finished or not, through which alone new gradients can meet its features."""
    path = folder / DIRECTIONS
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            whole = (file.metadata() or {}).get(_DIGEST) == directions_digest(found)
    except (OSError, SafetensorError) as error:
        raise artifacts.corrupt(path, f"cannot be read ({error})", f"delete {folder}.") from None
    if not whole:
        raise artifacts.corrupt(path, "differs from its checksum", f"delete {folder}.")
    return found


def keep_directions(folder: Path, directions: Mapping[str, Tensor]) -> None:
    """Write U where `stored_directions` finds it; no file where there are none."""
    if directions:
        with artifacts.atomic_file(folder / DIRECTIONS) as temporary:
            own = {name: U.detach().cpu().contiguous() for name, U in directions.items()}
            temporary.write_bytes(save(own, metadata={_DIGEST: directions_digest(own)}))
    else:
        (folder / DIRECTIONS).unlink(missing_ok=True)


@dataclass(frozen=True)
class FeatureStore:
    """A finished store, open for reading. Nothing is kept in memory but the prompt ids."""

    folder: Path
    identity: StoreIdentity
    prompt_ids: list[str]
    manifest: artifacts.Manifest

    def rows(self) -> pa.Table:
        """The table of `FEATURE_ROWS`, in the order of the features."""
        return artifacts.read_table(self.folder / "rows.parquet", FEATURE_ROWS)

    def features(self, start: int, stop: int) -> Float[Tensor, "B D"]:
        """Rows start to stop (exclusive) in float32: a copy."""
        return self._stored(start, stop).float()

    def influence(self, direction_features_VD: Float[Tensor, "V D"], block: int = BLOCK) -> Float[np.ndarray, "N V"]:
        """<f_i, d_v> in float64, read `block` rows at a time. A row that is not finite touches no other."""
        return self._products(direction_features_VD, block)

    def cosine(self, direction_features_VD: Float[Tensor, "V D"], block: int = BLOCK) -> Float[np.ndarray, "N V"]:
        """<f_i, d_v> / (|f_i| |d_v|) with the norms of the stored numbers; 0 where either is 0."""
        norms_N = np.empty(len(self.prompt_ids))
        products_NV = self._products(direction_features_VD, block, norms_N)
        norms_V = direction_features_VD.detach().cpu().double().norm(dim=1).numpy()
        return influence(products_NV, norms_N, norms_V, "cosine")

    def _products(self, directions_VD: Tensor, block: int, norms_N: np.ndarray | None = None) -> np.ndarray:
        """<f_i, d_v>; the norms of f_i are put into `norms_N`, if given, in the same pass."""
        if directions_VD.dim() != 2 or directions_VD.shape[1] != self.identity.dim:
            raise ValueError(f"directions (V, {self.identity.dim}) are needed, not {tuple(directions_VD.shape)}")
        directions_DV = directions_VD.detach().cpu().double().T
        products_NV = np.empty((len(self.prompt_ids), directions_DV.shape[1]))
        for start in range(0, len(self.prompt_ids), block):
            stop = min(start + block, len(self.prompt_ids))
            features_BD = self._stored(start, stop).double()
            products_NV[start:stop] = (features_BD @ directions_DV).numpy()
            if norms_N is not None:
                norms_N[start:stop] = features_BD.norm(dim=1).numpy()
        return products_NV

    def _stored(self, start: int, stop: int) -> Tensor:
        if not 0 <= start <= stop <= len(self.prompt_ids):
            raise ValueError(f"rows {start} to {stop} are not all among the store's {len(self.prompt_ids)}")
        dim = self.identity.dim
        dtype, _, layout = _FORMATS[self.identity.dtype]
        # Plain reads: pages of a memory map would count as this process's memory, and a read error would kill it.
        bits = np.fromfile(self.folder / _DATA, layout, (stop - start) * dim, offset=start * dim * dtype.itemsize)
        native = bits.astype(bits.dtype.newbyteorder("="), copy=False).reshape(stop - start, dim)
        return torch.from_numpy(native).view(dtype)


def open_store(folder: Path, identity: StoreIdentity | None = None) -> FeatureStore:
    """Open a finished store; ArtifactError where it is missing, damaged in any byte, or not of the given identity."""
    manifest = artifacts.open_artifact(folder, KIND, made_by="cropi run")
    if identity is not None:
        _same(folder, have=manifest.inputs, want=identity.inputs())
    prompt_ids = artifacts.read_table(folder / "rows.parquet", FEATURE_ROWS).column("prompt_id").to_pylist()
    return FeatureStore(folder, StoreIdentity(**manifest.details["identity"]), prompt_ids, manifest)


class FeatureStoreWriter:
    """Writes a store shard by shard; made again after an interruption, it goes on with what is missing.

    A shard is durable once its record exists: its rows, and the checksum of bytes that have reached the disk before.
    Neither the order of shards nor an interruption leaves a trace in the finished files.
    """

    def __init__(
        self,
        folder: Path,
        identity: StoreIdentity,
        prompt_ids: Sequence[str],
        shard_rows: int = 256,
        directions: Mapping[str, Tensor] | None = None,
        *,
        begun: bool = False,
    ) -> None:
        """`directions` are those that `identity` names; they may be left out where `folder` has them already. `begun`:
        another process has made a writer for it, and this one writes shards beside it.

        A store that was begun keeps its number of rows per shard, whatever `shard_rows` says: see `shard`. Raises
        ArtifactError where `folder` holds a store of another identity or of other prompts, or something else.
        """
        if len(set(prompt_ids)) != len(prompt_ids) or shard_rows < 1:
            raise ValueError("prompt ids must be unique, and a shard must have rows")
        self.folder, self.identity, self.prompt_ids, self.shard_rows = folder, identity, list(prompt_ids), shard_rows
        ids = hashlib.sha256(json.dumps(self.prompt_ids).encode()).hexdigest()
        self._inputs = {**identity.inputs(), "prompts": ids}
        # Names of unfinished files end in .part throughout, so that no manifest lists them.
        self._shards, self._part = folder / "shards", folder / f"{_DATA}.part"
        self._row_bytes = identity.dim * _FORMATS[identity.dtype][0].itemsize
        self._records: list[Path] = []  # of all shards of an unfinished store
        self._finished: FeatureStore | None = None
        if artifacts.is_finished(folder):
            self._finished = open_store(folder, identity)
            _same(folder, have=self._finished.manifest.inputs, want=self._inputs)
            shutil.rmtree(self._shards, ignore_errors=True)
            return
        if not begun:
            self._begin(directions)
        self._join()

    def shard(self, index: int) -> slice:
        """The prompts of a shard."""
        start = index * self.shard_rows
        if not 0 <= start < len(self.prompt_ids):
            raise ValueError(f"there is no shard {index}")
        return slice(start, min(start + self.shard_rows, len(self.prompt_ids)))

    def missing(self) -> list[int]:
        """Shards still to be written, damaged ones among them. Reads all that has been written so far."""
        return [index for index in range(len(self._records)) if not self._is_durable(index)]

    def write_shard(self, index: int, features_BD: Float[Tensor, "B D"], rows: Sequence[Mapping[str, Any]]) -> None:
        """Write one shard in full, features rounded to the store's dtype; `rows` are those of `FEATURE_ROWS`.

        ValueError where they are not exactly its prompts, or it is there already; ArtifactError for a full disk.
        """
        part = self.shard(index)
        shape = (part.stop - part.start, self.identity.dim)
        if tuple(features_BD.shape) != shape:
            raise ValueError(f"shard {index} is features of shape {shape}, not {tuple(features_BD.shape)}")
        names = set(FEATURE_ROWS.names)
        if any(set(row) != names for row in rows) or [row["prompt_id"] for row in rows] != self.prompt_ids[part]:
            raise ValueError(f"shard {index} needs one row for each of its prompts, in their order, with {names}")
        if self._finished is not None or self._is_durable(index):
            raise ValueError(f"shard {index} has been written already")
        dtype, integer, layout = _FORMATS[self.identity.dtype]
        bits = features_BD.detach().to("cpu", dtype).contiguous().view(integer).numpy().astype(layout, copy=False)
        _write(self._part, part.start * self._row_bytes, bits.data)
        checksum = hashlib.sha256(bits.data).hexdigest()
        artifacts.write_table(self._records[index], [{**row, "sha256": checksum} for row in rows], _RECORD)

    def finish(self) -> FeatureStore:
        """Turn the shards into a finished store. ValueError while some are missing."""
        if self._finished is None:
            digest = hashlib.sha256()  # of the whole file, in the same reading that checks the shards
            if missing := [index for index in range(len(self._records)) if not self._is_durable(index, digest)]:
                raise ValueError(f"shards {missing} are still to be written")
            records = [artifacts.read_table(path, _RECORD).select(FEATURE_ROWS.names) for path in self._records]
            rows = pa.concat_tables([FEATURE_ROWS.empty_table(), *records]).combine_chunks()
            artifacts.write_batches(self.folder / "rows.parquet", rows.to_batches(), FEATURE_ROWS)
            self._part.replace(self.folder / _DATA)
            manifest = artifacts.finish(
                self.folder,
                KIND,
                inputs=self._inputs,
                counts=artifacts.count_status(rows.column("status").to_pylist()),
                details={"identity": asdict(self.identity)},
                known={_DATA: digest.hexdigest()},
            )
            self._finished, self._records = FeatureStore(self.folder, self.identity, self.prompt_ids, manifest), []
            shutil.rmtree(self._shards)
        return self._finished

    def _begin(self, directions: Mapping[str, Tensor] | None) -> None:
        """Make the files of an unfinished store, or go on with those that are there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        begun = (self._shards / _BEGUN).is_file()
        if begun:
            _same(self.folder, have=artifacts.read_sealed(self._shards / _BEGUN)["inputs"], want=self._inputs)
        else:
            foreign = {p.name for p in self.folder.iterdir() if p.suffix != ".part"} - {DIRECTIONS, self._shards.name}
            if foreign:
                what = f"holds files that are no part of a feature store: {', '.join(sorted(foreign)[:5])}"
                raise ArtifactError(what, where=str(self.folder), fix="give the store a folder of its own.")
            shutil.rmtree(self._shards, ignore_errors=True)
        for leftover in self.folder.glob(".*.part"):
            leftover.unlink()
        self._keep_directions(directions)
        if not begun:
            known = {"inputs": self._inputs, "shard_rows": self.shard_rows}
            artifacts.write_sealed(self._shards / _BEGUN, known)
        if (self.folder / _DATA).is_file():  # an interruption came between the renaming and the manifest
            (self.folder / _DATA).replace(self._part)
        self._allocate(len(self.prompt_ids) * self._row_bytes)

    def _join(self) -> None:
        """Write beside what is there."""
        artifacts.wait_for_files([self._shards / _BEGUN])
        begun = artifacts.read_sealed(self._shards / _BEGUN)
        _same(self.folder, have=begun["inputs"], want=self._inputs)
        self.shard_rows = begun["shard_rows"]
        count = -(-len(self.prompt_ids) // self.shard_rows)
        self._records = [self._shards / f"{index:06d}.parquet.part" for index in range(count)]

    def wait_for_records(self) -> None:
        """Until the shards that other processes have written are to be seen here."""
        artifacts.wait_for_files(self._records)

    def _keep_directions(self, directions: Mapping[str, Tensor] | None) -> None:
        if directions is None:
            directions = stored_directions(self.folder) if self.identity.directions else {}
        if directions_digest(directions) != self.identity.directions:
            raise ValueError("the directions are not those that the store's identity names")
        keep_directions(self.folder, directions)

    def _allocate(self, size: int) -> None:
        """Give the data file its length. A disk that is too small is found here, before anything is computed."""
        free = shutil.disk_usage(self.folder).free
        if not self._part.is_file() and free < size:
            what = f"no space: the features need {size / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB left"
            raise ArtifactError(what, where=str(self._part), fix="free some space, or project to fewer dimensions.")
        with self._part.open("ab") as file:
            file.truncate(size)

    def _is_durable(self, index: int, digest: hashlib._Hash | None = None) -> bool:
        """Whether the record of a shard is there and its checksum is that of its bytes, which `digest` is given too."""
        part = self.shard(index)
        try:
            known = artifacts.read_table(self._records[index], _RECORD).to_pydict()
        except ArtifactError:  # missing, or cut short
            return False
        with self._part.open("rb") as file:
            file.seek(part.start * self._row_bytes)
            data = file.read((part.stop - part.start) * self._row_bytes)
        if digest is not None:
            digest.update(data)
        checksum = hashlib.sha256(data).hexdigest()
        return known["prompt_id"] == self.prompt_ids[part] and set(known["sha256"]) == {checksum}


def _same(folder: Path, *, have: Mapping[str, str], want: Mapping[str, str]) -> None:
    """ArtifactError that names what differs, if anything that is wanted does."""
    other = [f"{name} (have {have.get(name)!r}, want {want[name]!r})" for name in want if have.get(name) != want[name]]
    if other:
        fix = f"delete {folder} to make it anew, or go back to what it was made with."
        raise ArtifactError(f"was made with another {', another '.join(other)}", where=str(folder), fix=fix)


def _write(path: Path, offset: int, data: memoryview) -> None:
    """Write into a file; the bytes have reached the disk when this returns."""
    try:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise artifacts.no_space(path) if error.errno in {errno.ENOSPC, errno.EDQUOT} else error from None
