"""A state of nested dictionaries, lists, numbers and arrays as two files with digests, free of pickle."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cropi.artifacts import atomic_file, write_text
from cropi.errors import ArtifactError

ARRAYS, VALUES = "curriculum.npz", "curriculum.json"
_ARRAY, _TENSOR, _TUPLE = "__array__", "__tensor__", "__tuple__"


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `curriculum.npz` (arrays) and then `curriculum.json` (all else, with the digest of both)."""
    arrays: dict[str, np.ndarray] = {}
    values = _packed(state, arrays)
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    content = stream.getvalue()
    with atomic_file(folder / ARRAYS) as path:
        path.write_bytes(content)
    body = {"values": values, "arrays_sha256": hashlib.sha256(content).hexdigest()}
    write_text(folder / VALUES, json.dumps(body | {"sha256": _digest(body)}))


def load_state(folder: Path) -> dict[str, Any]:
    """Read a state back. ArtifactError where it is missing or was changed: training cannot go on without it."""
    try:
        body = json.loads((folder / VALUES).read_text(encoding="utf-8"))
        content, known = (folder / ARRAYS).read_bytes(), body.pop("sha256")
    except FileNotFoundError as error:
        raise _unusable(folder, f"the curriculum's state is missing ({Path(error.filename).name})") from None
    except (OSError, ValueError, KeyError, AttributeError):
        raise _unusable(folder, "the curriculum's state cannot be read") from None
    if known != _digest(body) or body.get("arrays_sha256") != hashlib.sha256(content).hexdigest():
        raise _unusable(folder, "the curriculum's state was changed")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(_unpacked(body["values"], arrays))


def _packed(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Plain JSON values, with arrays and tensors moved to `arrays`."""
    if isinstance(value, Mapping):
        return {"__map__": [[_packed(key, arrays), _packed(each, arrays)] for key, each in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_packed(each, arrays) for each in value]}
    if isinstance(value, list):
        return [_packed(each, arrays) for each in value]
    if isinstance(value, np.ndarray | torch.Tensor):
        name = str(len(arrays))
        arrays[name] = value if isinstance(value, np.ndarray) else value.detach().cpu().numpy()
        return {_ARRAY if isinstance(value, np.ndarray) else _TENSOR: name}
    return value.item() if isinstance(value, np.generic) else value


def _unpacked(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_unpacked(each, arrays) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "__map__":
        return {_unpacked(key, arrays): _unpacked(each, arrays) for key, each in content}
    if kind == _TUPLE:
        return tuple(_unpacked(each, arrays) for each in content)
    return arrays[content] if kind == _ARRAY else torch.from_numpy(arrays[content].copy())


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _unusable(folder: Path, problem: str) -> ArtifactError:
    return ArtifactError(
        f"{problem}, and without it training cannot go on",
        where=str(folder),
        fix="put back a copy, or delete the checkpoint to go on from the one before it.",
    )
