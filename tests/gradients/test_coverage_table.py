"""docs/architectures.md says what its script finds."""

import pytest
from tests.gradients.coverage_table import MODELS, cells, cells_by_family, coverage

FEW = ["SmolLM3", "GPT-OSS", "DeepSeek-V3", "DeepSeek-V4", "Qwen3-VL", "Qwen3-Next", "LFM2", "Falcon-H1"]


def check(name: str) -> None:
    found, written = coverage(name), cells_by_family()[name]
    again = cells(found)
    assert again[:2] == written[:2]
    assert max(float(error) for row in (again, written) for error in (row[2], row[4])) < 1e-4
    assert found[0].share == pytest.approx(float(written[3].rstrip(" %")) / 100, abs=0.02)
    assert [each.share for each in found[1:]] == pytest.approx([1.0] * len(found[1:]), abs=1e-6)


def test_the_page_has_the_families_of_the_script() -> None:
    assert list(cells_by_family()) == list(MODELS)
    assert len(MODELS) >= 40


@pytest.mark.parametrize("name", FEW)
def test_a_few_families_are_as_the_page_says(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name not in FEW])
def test_every_family_is_as_the_page_says(name: str) -> None:
    check(name)
