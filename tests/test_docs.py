import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from cropi.config.loading import TYPES
from cropi.gradients.direction import DirectionSketch
from cropi.stages.validation_pass import RANK

ROOT = Path(__file__).resolve().parents[1]


FOLDERS = ("docs", "research", "examples")
PAGES = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def is_broken(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    found = page.parent / path if path else page
    return not found.exists() or (bool(anchor) and anchor not in anchors(found))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_in_the_docs_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert [target for target in links if "://" not in target and is_broken(page, target)] == []


def test_the_docs_are_short() -> None:
    counts = {page: len(page.read_text(encoding="utf-8").split()) for page in (ROOT / "docs").rglob("*.md")}
    assert sum(counts.values()) <= 20_000
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_settings_that_the_docs_name_exist() -> None:
    reference = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    tables = re.findall(r"^## `([\w.]+)[^`]*`$(.*?)(?=^## |\Z)", reference, re.MULTILINE | re.DOTALL)
    known = {f"{table}.{key}" for table, text in tables for key in re.findall(r"^- `(\w+)` \(", text, re.MULTILINE)}
    places = "|".join({name.split(".")[0] for name, _ in tables})
    pages = [
        page
        for page in PAGES
        if page.parent in (ROOT, ROOT / "docs") and page.name not in ("config.md", "CHANGELOG.md")
    ]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(rf"[`\s]((?:{places})\.[a-z_.]+[a-z_])[`=:]", text))
    assert len(named) > 20
    assert sorted(named - known) == []


def test_the_formula_of_flops_names_the_rank_and_the_sketches_that_are_used() -> None:
    words = " ".join((ROOT / "docs" / "compare.md").read_text(encoding="utf-8").split())
    rank, first, second = map(int, re.findall(r"rank r = (\d+); sketches have k = (\d+) and l = (\d+)", words)[0])
    sums = DirectionSketch(torch.nn.Linear(98, 99), rank).sums()
    assert (rank, first, second) == (RANK, sums["after/weight"].shape[2], sums["before/weight"].shape[1])


def test_the_changelog_names_every_strategy_and_no_other() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (item,) = re.findall(r"^- Strategies: ((?:.|\n)+?)^-", text, re.MULTILINE)
    assert set(re.findall(r"`([a-z_]+)`", item)) - {"shuffled"} == TYPES


def test_the_config_reference_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["config_reference.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts/config_reference.py"), run_name="__main__")
    assert ended.value.code == 0


def test_the_example_of_the_engine_runs_and_tells_skills_apart(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/influence/score.py"), run_name="__main__")
    lines = (line.split() for line in capsys.readouterr().out.splitlines())
    table = {words[0]: [float(word) for word in words[1:]] for words in lines if len(words) == 3 and words[0] != "pool"}
    assert set(table) == {"sum", "machine", "compass", "depth"}
    for column, target in enumerate(("sum", "machine")):
        assert max(table, key=lambda family: table[family][column]) == target
