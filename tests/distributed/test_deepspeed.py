"""A run under DeepSpeed's ZeRO-2 by two processes, which is that of plain data parallelism: `make test-deepspeed`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.distributed.launching import finished, launch
from tests.runs import SMALL, evaluations, selections
from tests.trl.test_trainer import trained_by_two

from cropi.artifacts import read_jsonl, write_json

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

RUN = Path("runs/quickstart")
ARM = RUN / "arms/influence"
LAST = ARM / "checkpoints/checkpoint-6"
ARGUMENTS = [*SMALL, "baselines=[]"]

CPU = {"DS_ACCELERATOR": "cpu"}
DEEPSPEED = CPU | {  # what `accelerate launch --use_deepspeed --zero_stage 2` hands on
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
    "ACCELERATE_GRADIENT_CLIPPING": "auto",
}


def divided(*arguments: str, cwd: Path, processes: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    return launch(processes, *arguments, cwd=cwd, **(DEEPSPEED | environment))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run under ZeRO-2, by the command of the docs."""
    cwd = tmp_path_factory.mktemp("deepspeed")
    options = ["--use_deepspeed", "--zero_stage", "2", "--num_processes", "2", "--num_machines", "1"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, "--dynamo_backend", "no"]
    call = [*launcher, "--mixed_precision", "no", "-m", "cropi", "run", "quickstart", *ARGUMENTS]
    done = finished(call, cwd=cwd, **CPU)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: runs/quickstart/report.html") == 1
    assert (cwd / LAST / "latest").read_text() == "global_step6"
    return cwd


@pytest.fixture
def shortened(run: Path, tmp_path: Path) -> Path:
    """The run as it was after its first stage."""
    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / LAST)
    return tmp_path / "copy"


def steps(cwd: Path) -> list[dict[str, object]]:
    return [{k: row[k] for k in ("step", "prompt_ids", "rewards")} for row in read_jsonl(cwd / ARM / "rewards.jsonl")]


def test_it_is_the_run_of_plain_data_parallelism(run: Path, tmp_path: Path) -> None:
    """Scored and sampled between the stages with the weights as they have become, to the bit."""
    done = launch(2, "run", "quickstart", *ARGUMENTS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert selections(tmp_path / RUN) == selections(run / RUN)
    assert evaluations(tmp_path / RUN) == evaluations(run / RUN)
    assert steps(tmp_path) == steps(run)
    name = LAST / "model.safetensors"
    assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


def test_it_goes_on_from_a_checkpoint(run: Path, shortened: Path) -> None:
    done = launch(2, "train", "runs/quickstart", cwd=shortened)
    assert done.returncode != 0
    assert "training began with DeepSpeed and would go on with plain data parallelism" in done.stderr
    done = divided("train", "runs/quickstart", cwd=shortened, processes=4)
    assert done.returncode != 0
    assert "divided by DeepSpeed among 2 processes, and there are 4 now" in done.stderr
    done = divided("train", "runs/quickstart", cwd=shortened)
    assert done.returncode == 0, done.stderr
    assert (shortened / LAST / "model.safetensors").read_bytes() == (run / LAST / "model.safetensors").read_bytes()
    assert steps(shortened) == steps(run)


class _Planted:
    """Touches a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(shortened: Path) -> None:
    planted = shortened / "planted"
    checkpoint = shortened / ARM / "checkpoints/checkpoint-3"
    (state,) = checkpoint.glob("global_step3/zero_pp_rank_0_*_optim_states.pt")
    torch.save({"planted": _Planted(planted)}, state)
    complete = json.loads((checkpoint / "complete.json").read_text())
    complete["sizes"][str(state.relative_to(checkpoint))] = state.stat().st_size
    write_json(checkpoint / "complete.json", complete)
    done = divided("train", "runs/quickstart", cwd=shortened)
    assert done.returncode != 0
    assert "Weights only load failed" in done.stderr
    assert not planted.exists()


def test_divided_weights_are_refused(tmp_path: Path) -> None:
    done = divided("run", "quickstart", *ARGUMENTS, cwd=tmp_path, ACCELERATE_DEEPSPEED_ZERO_STAGE="3")
    assert done.returncode != 0
    assert "divided among the processes by DeepSpeed's ZeRO-3" in done.stderr


def test_a_trl_script_trains_on_one_selection_under_it(tmp_path: Path) -> None:
    trained_by_two(tmp_path, **DEEPSPEED)
    assert (tmp_path / "sum-1").read_text().endswith(" True")
