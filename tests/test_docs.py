import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_relative_links_in_the_docs_resolve() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    assert len(pages) > 10
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []


def test_the_config_reference_is_up_to_date() -> None:
    command = [sys.executable, "scripts/config_reference.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_example_of_the_engine_runs_and_tells_skills_apart() -> None:
    command = [sys.executable, "examples/influence/score.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = (line.split() for line in done.stdout.splitlines())
    table = {words[0]: [float(word) for word in words[1:]] for words in lines if len(words) == 3 and words[0] != "pool"}
    assert set(table) == {"sum", "machine", "compass", "depth"}
    for column, target in enumerate(("sum", "machine")):
        assert max(table, key=lambda family: table[family][column]) == target
