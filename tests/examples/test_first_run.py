"""The first run of a newcomer, as a script and as a notebook, with fewer prompts and steps."""

import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
from tests.test_api import TINY

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "first_run"


def test_the_script_runs_and_says_what_it_needs(tmp_path, monkeypatch, capsys):
    script = FOLDER / "first_run.py"
    block = re.search(r"^# /// script\n(.*?)^# ///$", script.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block
    needs = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))
    assert needs["dependencies"] == ["cropi"]
    assert (FOLDER / needs["tool"]["uv"]["sources"]["cropi"]["path"] / "pyproject.toml").samefile(
        ROOT / "pyproject.toml"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *TINY])
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert "runs/quickstart/report.html" in said
    assert re.search(r"^sum +\d+ +8$", said, re.MULTILINE)


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel of its own, as Jupyter runs it; a first cell makes it small."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(FOLDER / "first_run.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    small = f"import cropi\nreal = cropi.run\ncropi.run = lambda config, *more: real(config, *more, *{TINY!r})"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(small))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # of the machine that runs the test
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [
        output["data"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "execute_result"
    ]
    assert len(shown) == len([cell for cell in notebook.cells if cell.cell_type == "code"]) - 1
    assert all("<table" in data["text/html"] for data in shown if "text/html" in data)
    assert "text/html" in shown[0]


def test_the_lock_holds_every_package_that_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    locked = {package["name"] for package in tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]}
    asked = list(project["project"]["dependencies"])
    asked += [package for extra in project["project"]["optional-dependencies"].values() for package in extra]
    asked += [package for package in project["dependency-groups"]["dev"] if isinstance(package, str)]
    names = {re.split(r"[\[<>=~ ]", package)[0].lower().replace("_", "-") for package in asked}
    assert sorted(names - locked) == []
