"""The state of a curriculum in a checkpoint: what is read back equals what was written, or is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cropi.errors import ArtifactError
from cropi.stages.online_loop import ARRAYS, VALUES, load_state, save_state

STATE = {
    "curriculum": {"numbers": np.arange(6.0).reshape(2, 3), "facts": np.frombuffer(b"{}", dtype=np.uint8)},
    "sketches": {"one/layer/weight": torch.ones(2, 2)},
    "choices": [[3, 1], [2]],
    "share_read": None,
}


def test_a_state_is_read_back_as_it_was(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    state = load_state(tmp_path)
    assert {part: [*own] for part, own in state.items() if isinstance(own, dict)} == {
        "curriculum": ["numbers", "facts"],
        "sketches": ["one/layer/weight"],
    }
    assert np.array_equal(state["curriculum"]["numbers"], np.arange(6.0).reshape(2, 3))
    assert state["curriculum"]["facts"].tobytes() == b"{}"
    assert state["sketches"]["one/layer/weight"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert (state["choices"], state["share_read"]) == ([[3, 1], [2]], None)


@pytest.mark.parametrize("name", [ARRAYS, VALUES])
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_missing_or_changed_state_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    save_state(tmp_path, STATE)
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    with pytest.raises(ArtifactError, match="curriculum"):
        load_state(tmp_path)
