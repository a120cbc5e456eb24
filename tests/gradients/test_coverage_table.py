"""docs/architectures.md says what its script finds."""

import pytest
from tests.gradients.coverage_table import MODELS, coverage, lines_by_family

FEW = ["SmolLM3", "GPT-OSS", "DeepSeek-V3", "Qwen3-VL, images left out"]


def check(name: str) -> None:
    found = coverage(name)
    *ways, score_error, share, read_error = lines_by_family()[name]
    assert tuple(ways) == (found.ways[0], found.ways[1])
    assert max(found.score_error, found.read_error, float(score_error), float(read_error)) < 1e-4
    assert found.shares[0] == pytest.approx(float(share.rstrip("%")) / 100, abs=0.02)
    assert found.shares[1] == pytest.approx(1, abs=1e-6)


def test_the_page_has_the_families_of_the_script() -> None:
    assert list(lines_by_family()) == list(MODELS)
    assert len(MODELS) >= 40


@pytest.mark.parametrize("name", FEW)
def test_a_few_families_are_as_the_page_says(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name not in FEW])
def test_every_family_is_as_the_page_says(name: str) -> None:
    check(name)
