import importlib.util
from pathlib import Path
from types import ModuleType

FILES = {
    "__init__.py": '"""A package."""\n',
    "config.py": "class Config:\n    pass\n",
    "pipeline.py": "from tiny.config import Config\n\nfrom tiny import score\n\ndef run(config: Config) -> None: ...\n",
    "score.py": "def score(self, a, *, b, **c):\n    from tiny.inner.deep import depth\n\n    return depth\n",
    "inner/__init__.py": "",
    "inner/deep.py": '"""What is deep."""\n\nimport tiny.config\n\ndepth = 1\n',
    "lab/compare.py": "import tiny.score\n",
}


def house() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "scripts" / "house.py"
    spec = importlib.util.spec_from_file_location("house", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_tiny_package_is_counted(tmp_path: Path) -> None:
    package = tmp_path / "tiny"
    for name, text in FILES.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
    script = house()
    sizes = script.size_numbers(package, entries=["score"], pipeline=["pipeline"])
    assert sizes == {
        "outside lab: lines": 12,
        "outside lab: files": 4,
        "lab: lines": 1,
        "lab: files": 1,
        "score -> select -> train: lines": 8,
        "score -> select -> train: files": 3,
        "... without the ground: lines": 6,
        "... without the ground: files": 2,
        "rooms a config passes through": 2,  # the pipeline and inner
    }
    style = script.style_numbers(package)
    assert style["parameters of a function, largest"] == 3
    assert style["... that function"] == "score.score"
    assert style["docstrings that begin with What, Where, Whose, How"] == 1
