"""The site builds without a broken link, and holds the reference of the Python interface."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "python/index.html").read_text(encoding="utf-8")
    for name in ("cropi.api.load", "cropi.api.RunResult.curriculum", "cropi.trl.Selector"):
        assert f'id="{name}"' in reference
    assert "](python.md)" in (tmp_path / "llms.txt").read_text(encoding="utf-8")
    assert "cropi.load" in (tmp_path / "python.md").read_text(encoding="utf-8")
    assert "https://fonts." not in reference
