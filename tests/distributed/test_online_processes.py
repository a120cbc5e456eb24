"""An online run by two processes (DDP, FSDP2, ZeRO) is that of one, given the same completions."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.distributed.launching import LAUNCHER, finished, zero
from tests.distributed.test_fsdp import FSDP, sharded
from tests.runs import SMALL, json_lines

from cropi.stages.online_loop import load_state

pytestmark = pytest.mark.slow

ONLINE = [
    *(text for text in SMALL if not text.startswith(("select.", "trainer.per_device", "evaluate."))),
    "select.strategy={type: cropi}",
    "trainer.per_device_train_batch_size=6",  # 3 groups of 8, one of which lies on both processes
    "trainer.gradient_accumulation_steps=4",
    "trainer.optim=sgd",  # Adam turns rounding of gradients that are near zero into whole steps
    "trainer.learning_rate=0.01",
    "name=run",
]
RUN = Path("runs/run")


def run(folder: Path, mode: str, processes: int = 1, environment: Mapping[str, str] | None = None) -> None:
    script = [str(Path(__file__).with_name("replaying.py")), mode, str(folder), "run", "quickstart"]
    start = [sys.executable] if processes == 1 else [*LAUNCHER, str(processes)]
    done = finished([*start, *script, *ONLINE], cwd=folder, **(environment or {}))
    assert done.returncode == 0, done.stderr
    assert "shards no weights" not in done.stderr


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, whose completions the others replay."""
    folder = tmp_path_factory.mktemp("one")
    run(folder, "record")
    return folder


KINDS = {"ddp": {}, "fsdp": FSDP, "zero-2": zero(2), "zero-3": zero(3)}


@pytest.fixture(scope="module", params=KINDS)
def replayed(recorded: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The run of two processes."""
    if "zero" in request.param:
        pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copy(recorded / "completions.json", folder)
    run(folder, "replay", 2, KINDS[request.param])
    return folder


def told(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return json_lines(folder / f"told-{rank}.jsonl")


def without(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in names} for row in rows]


def values(rows: list[dict[str, Any]]) -> np.ndarray:
    """Inner products, by observation."""
    found = [row["influence"] for row in rows if row["influence"] is not None]
    return np.array([each["sum"] if isinstance(each, dict) else each for each in found])


def test_evidence_is_that_of_one_process(recorded: Path, replayed: Path) -> None:
    """To 1e-5 of its size, in the same order."""
    one, two = told(recorded), told(replayed)
    assert without(two, "influence", "state") == without(one, "influence", "state")
    assert [row["influence"] is None for row in two] == [row["influence"] is None for row in one]
    assert sum(row["kind"] == "observe" and row["influence"] is not None for row in one) >= 12
    wanted, found = values(one), values(two)
    assert (np.abs(found - wanted) <= 1e-5 * np.abs(wanted).max(axis=(1, 2), keepdims=True)).all()


def test_all_processes_hold_the_same_state(replayed: Path) -> None:
    """After every observation, bit for bit."""
    assert told(replayed, 1) == told(replayed)


def test_choices_are_those_of_one_process_and_written_once(recorded: Path, replayed: Path) -> None:
    folders = recorded / RUN, replayed / RUN
    one, two = (json_lines(folder / "choices.jsonl") for folder in folders)
    assert two == one
    states = [load_state(folder / "checkpoints/checkpoint-6") for folder in folders]
    assert states[0]["choices"] == states[1]["choices"]
    assert states[0]["share_read"] == pytest.approx(states[1]["share_read"], abs=0.1)  # of other micro-batches


def test_what_is_charged_is_charged_once(recorded: Path, replayed: Path) -> None:
    names = "phase", "stage", "step", "tokens", "prompt_tokens", "validation_tokens", "forward_tokens"
    one, two = (
        [[row.get(name) for name in names] for row in json_lines(folder / RUN / "ledger.jsonl")]
        for folder in (recorded, replayed)
    )
    assert two == one


def test_sharded_weights_sample_their_own_and_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    """To the same weights, choices and state."""
    done = sharded("run", "quickstart", *ONLINE, "trainer.optim=adamw_torch", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last = tmp_path / RUN / "checkpoints/checkpoint-6"
    names = "model.safetensors", "curriculum.json", "curriculum.npz"
    expected = [(last / name).read_bytes() for name in names]
    choices = [row["prompt_ids"] for row in json_lines(tmp_path / RUN / "choices.jsonl")]
    shutil.rmtree(last)
    done = sharded("train", "runs/run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(last / name).read_bytes() for name in names] == expected
    assert [row["prompt_ids"] for row in json_lines(tmp_path / RUN / "choices.jsonl")] == choices
