"""The `score` stage on a policy whose parameters are sharded over two processes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import tiny_llama
from tests.gradients.ranks import as_accelerate_does, run_on_processes
from tests.stages.test_score import NAMES, SOURCES, TABLES, config
from torch.distributed.device_mesh import DeviceMesh

from cropi import parallel
from cropi.artifacts import read_table
from cropi.gradients import score_shards
from cropi.gradients.groups import surrogate_settings
from cropi.run_tables import scores_schema
from cropi.stages.score import ScoredPool, score_pool

pytestmark = pytest.mark.slow  # processes of its own for every worker of the tests

WAYS = {"parts": [], "errors": ["score.standard_errors=true"], "exact": ["score.estimator=exact"]}


def stage(overrides: Sequence[str], model: Any, folder: Path) -> None:
    chosen = config(*overrides)
    settings = surrogate_settings(chosen, "dr_grpo", "none")
    (folder / "scores").mkdir(parents=True, exist_ok=True)
    score_pool(chosen, settings, model, ScoredPool(TABLES, SOURCES), folder / "scores")


def scored(folder: Path) -> list[dict[str, Any]]:
    return read_table(folder / "scores" / "scores.parquet", scores_schema(NAMES)).to_pylist()


def pieces_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten groups are four pieces, the last of one group: the processes have different work."""
    monkeypatch.setattr(score_shards, "SHARD_PROMPTS", 3)


def shared(overrides: Sequence[str], folder: Path, mesh: DeviceMesh) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        pieces_of_three(monkeypatch)
        monkeypatch.setattr(parallel, "_group", parallel.Ranks())
        stage(overrides, as_accelerate_does(tiny_llama(tied=True), mesh), folder)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders by way, of two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    for found in run_on_processes([partial(shared, ways, folder / name) for name, ways in WAYS.items()], 2):
        assert found == [None, None], found
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_score_as_one_that_has_the_whole_policy(way, of_two, tmp_path, monkeypatch):
    pieces_of_three(monkeypatch)
    stage(WAYS[way], tiny_llama(tied=True), tmp_path)
    one, two = scored(tmp_path), scored(of_two / way)
    assert [row["status"] for row in two] == [row["status"] for row in one]
    for expected, row in zip(one, two, strict=True):
        for name, value in expected.items():
            if isinstance(value, float):
                np.testing.assert_allclose(row[name], value, rtol=1e-4, atol=1e-7, err_msg=name)
            else:
                assert row[name] == value
