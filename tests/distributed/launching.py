"""The real launcher on the CPU: `torchrun`, as `accelerate launch` and clusters start several GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
DEEPSPEED_CPU = {"DS_ACCELERATOR": "cpu"}
DEEPSPEED = DEEPSPEED_CPU | {  # what `accelerate launch --use_deepspeed` hands on
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
    "ACCELERATE_GRADIENT_CLIPPING": "auto",
}


def zero(stage: int) -> dict[str, str]:
    """The environment of a launch under DeepSpeed's ZeRO."""
    return DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}


def command(processes: int, *arguments: str, restarts: int = 0) -> list[str]:
    """Build the call that starts this many processes of the command; one starts without a launcher."""
    if processes == 1:
        return [sys.executable, "-m", "cropi", *arguments]
    return [*LAUNCHER, str(processes), "--max-restarts", str(restarts), "-m", "cropi", *arguments]


def launch(
    processes: int, *arguments: str, cwd: Path, restarts: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return finished(command(processes, *arguments, restarts=restarts), cwd=cwd, **environment)


def launch_ok(processes: int, *arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; it must succeed."""
    done = launch(processes, *arguments, cwd=cwd, **options)
    assert done.returncode == 0, done.stderr
    return done


def finished(call: Sequence[str], *, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run any launcher's call to its end."""
    return subprocess.run(
        call, cwd=cwd, capture_output=True, text=True, timeout=600, env=os.environ | environment, check=False
    )


def kill_a_rank(
    moment: Callable[[], bool], *arguments: str, cwd: Path, rank: int = 1, restarts: int = 0
) -> tuple[int, str]:
    """Start two processes and kill -9 one of them once the moment has come; the launcher's (exit code, stderr)."""
    errors = cwd / "stderr.txt"
    with errors.open("w") as file:
        launcher = subprocess.Popen(
            command(2, *arguments, restarts=restarts), cwd=cwd, stdout=subprocess.DEVNULL, stderr=file
        )
        deadline = time.monotonic() + 300
        while not moment():
            assert launcher.poll() is None, f"ended before the moment came: {errors.read_text()}"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        _ranks(launcher.pid)[rank].send_signal(signal.SIGKILL)
        return launcher.wait(timeout=300), errors.read_text()


def _ranks(launcher: int) -> dict[int, psutil.Process]:
    """The launcher's processes by rank."""
    children = psutil.Process(launcher).children()
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}
