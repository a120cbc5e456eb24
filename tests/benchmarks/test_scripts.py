"""Benchmark scripts run as they say, at sizes that take seconds."""

import json
import sys
from pathlib import Path

import pytest
import reading
import scale
import sharded


def printed(script, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    script.main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_reading_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(reading, "ROUNDS", 2)
    monkeypatch.setattr(reading, "MEMORY_ROUNDS", 1)
    size = ["--rows", "4", "--tokens", "8", "--sets", "2"]
    (cost,), (memory,), ranks = (
        printed(reading, monkeypatch, capsys, name, *size) for name in ("cost", "memory", "fidelity")
    )
    assert cost["share_read"] == pytest.approx(1)
    assert 0.5 < memory["ratio"] < 5
    assert [line["rank"] for line in ranks] == [4, 8, 16, 32, 64]
    assert ranks[-1]["spearman"] > 0.9


@pytest.mark.slow
def test_sharded_scoring_is_measured_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    shapes = ["--equal-shape", "tiny", "--shape", "tiny", "--device", "cpu"]
    sizes = ["--prompts", "4", "--validation", "4", "--output", str(tmp_path / "found.json")]
    lines = printed(sharded, monkeypatch, capsys, *shapes, *sizes)
    written = json.loads((tmp_path / "found.json").read_text())
    assert [written["equal"], written["large"]] == lines
    assert written["equal"]["sharded_to_whole"]["largest_relative_difference"] < 1e-6
    assert written["large"]["scored"]["tokens_computed"] > 0


def test_a_power_law_gives_its_exponent():
    rounds = {size: [3 * size**1.25] * 3 for size in (10, 100, 1000)}
    assert scale.exponent_interval(rounds) == pytest.approx((1.25, 1.25, 1.25))
    whole, low, high = scale.exponent_interval({10: [9.0, 10.0, 11.0], 1000: [900.0, 1000.0, 1100.0]})
    assert whole == pytest.approx(1.0)
    assert low < whole < high


@pytest.mark.slow
@pytest.mark.parametrize("kind", scale.KINDS)
def test_growing_pools_are_measured(kind):
    rounds = [{"kind": kind, "size": size, **scale.one_here(kind, size)} for size in (300, 600)]
    lines = scale.table({"rounds": rounds}, kind).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["300", "600"]


def test_the_committed_rounds_are_drawn(tmp_path):
    scale.figure(Path(__file__).parents[2] / "research/figures/scale.json", tmp_path / "drawn.svg")
    drawn = (tmp_path / "drawn.svg").read_text(encoding="utf-8")
    assert all(scale.ABOUT[kind] in drawn for kind in scale.FIGURE)
