import json
from pathlib import Path

import pytest

from cropi.config import Config
from cropi.errors import ConfigError
from cropi.loading import load_config
from cropi.workspace import Workspace
from tests.runs import SMALL


def config(folder: Path, seed: int) -> Config:
    return load_config("quickstart", [*SMALL, f"run_dir={folder}", f"seed={seed}"])


@pytest.mark.parametrize("made", ["prompts/manifest.json", "trajectories/part-train-00000.parquet"])
def test_a_run_belongs_to_the_config_that_made_something_in_it(tmp_path: Path, made: str) -> None:
    """One that was refused before, for its data say, may be started again with another config."""
    folder = Workspace(config(tmp_path, 0)).folder
    Workspace(config(tmp_path, 1))
    assert json.loads((folder / "config.json").read_text())["seed"] == 1
    (folder / made).parent.mkdir()
    (folder / made).write_text("")
    with pytest.raises(ConfigError, match="seed: 1 -> 2"):
        Workspace(config(tmp_path, 2))
    assert json.loads((folder / "config.json").read_text())["seed"] == 1
