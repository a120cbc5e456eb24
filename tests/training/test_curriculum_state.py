"""The state of a curriculum in a checkpoint: what is read back equals what was written, or is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cropi.errors import ArtifactError
from cropi.training.curriculum_state import ARRAYS, VALUES, load_state, save_state

STATE = {
    "random": np.random.default_rng(3).bit_generator.state,
    "numbers": np.arange(6.0).reshape(2, 3),
    "sketch": {"layer": torch.ones(2, 2), "pairs": [(1, 2.5), ("a", None)]},
    "by place": {3: [np.float64(0.1)], 1: []},
}


def test_a_state_is_read_back_as_it_was(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    state = load_state(tmp_path)
    assert state["random"] == STATE["random"]
    assert np.array_equal(state["numbers"], STATE["numbers"])
    assert torch.equal(state["sketch"]["layer"], torch.ones(2, 2))
    assert state["sketch"]["pairs"] == [(1, 2.5), ("a", None)]
    assert state["by place"] == {3: [0.1], 1: []}


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
