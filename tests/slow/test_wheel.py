"""The built wheel, in an empty environment outside the checkout, runs the quickstart: the package data are complete."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def call(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(3600)
def test_the_wheel_runs_the_quickstart(tmp_path: Path) -> None:
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path / "dist", ROOT, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("cropi-*.whl")
    call(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    call(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    call(python, "-m", "pip", "check", cwd=tmp_path)
    (tmp_path / "elsewhere").mkdir()
    output = call(tmp_path / "env" / "bin" / "cropi", "run", "quickstart", cwd=tmp_path / "elsewhere")
    assert "report: runs/quickstart/report.html" in output
    assert (tmp_path / "elsewhere" / "runs" / "quickstart" / "report.html").is_file()
