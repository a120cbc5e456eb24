"""The benchmark of pools that grow: what it measures at a size that takes no time, and what it makes of the rounds."""

from pathlib import Path

import pytest
import scale


def test_a_power_law_gives_its_exponent() -> None:
    rounds = {size: [3 * size**1.25] * 3 for size in (10, 100, 1000)}
    assert scale.exponent_interval(rounds) == pytest.approx((1.25, 1.25, 1.25))
    noisy = {10: [9.0, 10.0, 11.0], 1000: [900.0, 1000.0, 1100.0]}
    whole, low, high = scale.exponent_interval(noisy)
    assert whole == pytest.approx(1.0)
    assert low < whole < high


@pytest.mark.parametrize("kind", scale.KINDS)
def test_every_kind_is_measured_and_shown(kind: str) -> None:
    sizes = (300, 600)
    rounds = [{"kind": kind, "size": size, **scale.one_here(kind, size)} for size in sizes]
    lines = scale.table({"rounds": rounds}, kind).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["300", "600"]
    assert lines[-1].startswith("cpu_s grows as size^")


def test_the_committed_rounds_are_drawn(tmp_path: Path) -> None:
    source = Path(__file__).resolve().parents[2] / "research" / "figures" / "scale.json"
    scale.figure(source, tmp_path / "drawn.svg")
    drawn = (tmp_path / "drawn.svg").read_text(encoding="utf-8")
    assert all(scale.ABOUT[kind] in drawn for kind in scale.FIGURE)
