"""Runs by two processes under DeepSpeed's ZeRO-2 and 3 are that of plain data parallelism: `make test-deepspeed`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.distributed.launching import DEEPSPEED_CPU, finished, launch, launch_ok, zero
from tests.runs import SMALL, evaluations, json_lines, selections
from tests.trl.test_trainer import trained_by_two

from cropi.artifacts import finish, read_manifest
from cropi.streams import read_jsonl
from cropi.training.sharding import PLAIN, ZERO_NAMES

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

RUN = Path("runs/quickstart")
LAST = RUN / "checkpoints/checkpoint-6"
ARGUMENTS = [*SMALL]


@dataclass(frozen=True)
class Run:
    cwd: Path
    stage: int

    def again(self, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
        return launch(processes, *arguments, cwd=self.cwd, **zero(self.stage))

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.cwd / LAST / "model.safetensors")

    def assert_ends_as(self, other: Run) -> None:
        """ZeRO-3 adds up the gradient's norm in another order, so that its last bit differs."""
        mine, others = self.weights(), other.weights()
        assert mine.keys() == others.keys()
        for name, weight in mine.items():
            torch.testing.assert_close(weight, others[name], rtol=0, atol=1e-5 if self.stage == 3 else 0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of plain data parallelism."""
    cwd = tmp_path_factory.mktemp("plain")
    launch_ok(2, "run", "quickstart", *ARGUMENTS, cwd=cwd)
    return Run(cwd, 0)


@pytest.fixture(scope="module", params=[2, 3])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run under ZeRO, by the command of the docs."""
    stage: int = request.param
    cwd = tmp_path_factory.mktemp(f"zero-{stage}")
    options = ["--use_deepspeed", "--zero_stage", str(stage), "--num_processes", "2", "--num_machines", "1"]
    if stage == 3:
        options += ["--zero3_save_16bit_model", "true"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, "--dynamo_backend", "no"]
    call = [*launcher, "--mixed_precision", "no", "-m", "cropi", "run", "quickstart", *ARGUMENTS]
    done = finished(call, cwd=cwd, **DEEPSPEED_CPU)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: runs/quickstart/report.html") == 1
    assert (cwd / LAST / "latest").read_text() == "global_step6"
    return Run(cwd, stage)


@pytest.fixture
def shortened(run: Run, tmp_path: Path) -> Run:
    """The run as it was after its first stage."""
    shutil.copytree(run.cwd, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / LAST)
    return Run(tmp_path / "copy", run.stage)


def steps(cwd: Path) -> list[dict[str, object]]:
    return [{k: row[k] for k in ("step", "prompt_ids", "rewards")} for row in read_jsonl(cwd / RUN / "rewards.jsonl")]


def selected(cwd: Path) -> list[list[object]]:
    """Prompt ids by stage, best first."""
    files = sorted((cwd / RUN).glob("selections/stage-*/selected.jsonl"))
    assert len(files) == 2
    return [[row["prompt_id"] for row in json_lines(file)] for file in files]


def test_it_is_the_run_of_plain_data_parallelism(run: Run, plain: Run) -> None:
    """Scored and sampled between the stages, and within one, with the weights as they have become."""
    assert selected(run.cwd) == selected(plain.cwd)
    if run.stage == 2:
        assert selections(run.cwd / RUN) == selections(plain.cwd / RUN)
    assert evaluations(run.cwd / RUN) == evaluations(plain.cwd / RUN)
    assert steps(run.cwd) == steps(plain.cwd)
    run.assert_ends_as(plain)


def test_it_goes_on_from_a_checkpoint(run: Run, shortened: Run) -> None:
    done = launch(2, "train", "runs/quickstart", cwd=shortened.cwd)
    assert done.returncode != 0
    assert f"training began with {ZERO_NAMES[run.stage == 3]} and would continue with {PLAIN}" in done.stderr
    done = shortened.again("train", "runs/quickstart", processes=4)
    assert done.returncode != 0
    assert "over 2 processes, but there are 4 now" in done.stderr
    done = shortened.again("train", "runs/quickstart")
    assert done.returncode == 0, done.stderr
    shortened.assert_ends_as(run)
    assert steps(shortened.cwd) == steps(run.cwd)


class _Planted:
    """Touches a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(shortened: Run) -> None:
    planted = shortened.cwd / "planted"
    checkpoint = shortened.cwd / RUN / "checkpoints/checkpoint-3"
    (state,) = checkpoint.glob("global_step3/zero_pp_rank_0_*_optim_states.pt")
    torch.save({"planted": _Planted(planted)}, state)
    before = read_manifest(checkpoint, "checkpoint", made_by="cropi train")
    finish(checkpoint, "checkpoint", inputs=before.inputs, counts={}, details=before.details)
    done = shortened.again("train", "runs/quickstart")
    assert done.returncode != 0
    assert "Weights only load failed" in done.stderr
    assert not planted.exists()


@pytest.mark.parametrize(
    ("arguments", "changed", "told"),
    [
        (["trainer.ds3_gather_for_generation=false"], {}, "generation with sharded weights"),
        ([], {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false"}, "checkpoints without whole weights"),
    ],
)
def test_what_cannot_be_gathered_is_refused(arguments, changed, told, tmp_path):
    done = launch(2, "run", "quickstart", *ARGUMENTS, *arguments, cwd=tmp_path, **(zero(3) | changed))
    assert done.returncode != 0
    assert told in done.stderr


@pytest.mark.parametrize("stage", [2, 3])
def test_a_trl_script_trains_on_one_selection_under_it(stage: int, tmp_path: Path) -> None:
    trained_by_two(tmp_path, **zero(stage))
    assert (tmp_path / "told-1").read_text().endswith(f" {stage}")
