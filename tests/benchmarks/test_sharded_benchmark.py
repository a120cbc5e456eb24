"""benchmarks/sharded.py runs as it says."""

import json
import sys
from pathlib import Path

import pytest
import sharded


def test_both_parts_run_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    shapes = ["--equal-shape", "tiny", "--shape", "tiny", "--device", "cpu"]
    sizes = ["--prompts", "4", "--validation", "4", "--output", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["sharded.py", *shapes, *sizes])
    sharded.main()
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    written = json.loads((tmp_path / "found.json").read_text())
    assert [written["equal"], written["large"]] == printed
    assert written["equal"]["sharded_to_whole"]["largest_relative_difference"] < 1e-6
    assert written["large"]["finite"]
    assert written["large"]["scored"]["tokens_computed"] > 0
