"""The first run of a newcomer, as a script and as a notebook, with fewer prompts and steps."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tests.test_api import TINY

import cropi

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "first_run"


def test_the_script_runs_and_says_what_it_needs(tmp_path: Path) -> None:
    script = FOLDER / "first_run.py"
    block = re.search(r"^# /// script\n(.*?)^# ///$", script.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block
    needs = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))
    assert needs["dependencies"] == ["cropi"]
    assert (FOLDER / needs["tool"]["uv"]["sources"]["cropi"]["path"] / "pyproject.toml").samefile(
        ROOT / "pyproject.toml"
    )
    command = [sys.executable, str(script), *TINY]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "runs/quickstart/report.html" in done.stdout
    assert re.search(r"^sum +\d+ +8$", done.stdout, re.MULTILINE)


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads((FOLDER / "first_run.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    real = cropi.run
    monkeypatch.setattr(cropi, "run", lambda config, *overrides: real(config, *overrides, *TINY), raising=False)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = []
    for cell in cells:
        if cell["cell_type"] == "code":
            *statements, last = ast.parse(cell["source"]).body
            exec(compile(ast.Module(statements, []), "cell", "exec"), names)
            assert isinstance(last, ast.Expr)
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
    assert "<table" in shown[0]._repr_html_()
    assert all(len(table) for table in shown[1:])


def test_the_lock_holds_every_package_that_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    locked = {package["name"] for package in tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]}
    asked = list(project["project"]["dependencies"])
    asked += [package for extra in project["project"]["optional-dependencies"].values() for package in extra]
    asked += [package for package in project["dependency-groups"]["dev"] if isinstance(package, str)]
    names = {re.split(r"[\[<>=~ ]", package)[0].lower().replace("_", "-") for package in asked}
    assert sorted(names - locked) == []
