"""Describe the machine that measures."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import cropi
from cropi.run_folder import environment


def describe(device: str, threads: int) -> dict[str, Any]:
    """Processor, versions, and the commit where cropi runs from a git checkout."""
    return environment() | {
        "commit": _commit(),
        "cpu": _cpu(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """With `+` behind it where files differ from the commit; None outside a checkout."""
    git, folder = shutil.which("git"), Path(cropi.__file__).parent
    if git is None:
        return None

    def ask(*arguments: str) -> str:
        command = [git, "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603

    if not ask("ls-files", "__init__.py"):  # the checkout of something else
        return None
    return ask("rev-parse", "HEAD") + ("+" if ask("status", "--porcelain", "--", str(folder)) else "")
