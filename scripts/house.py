"""Print the size of the source tree: a report beside every change, never a gate. `--json` prints JSON.

How it counts:

- Lines of source and tests are those that are not blank. An `__init__.py` counts as lines, not as a file.
- Functions and modules are as long as an editor shows them. Parameters are all but `self` and `cls`.
- "score -> select -> train" is ENTRIES and every module of the package that they import, directly or through others, at
  the top of a file or inside a function. "without the ground" stops at GROUND, which a reader may take as given, and
  follows one strategy: those in OTHER_STRATEGIES are its alternatives.
- A room is a module or package right below the package. A config passes through those that import from `cropi.config`
  among all that PIPELINE imports. This is an approximation: no value is traced.
- Settings are the rows of docs/config.md: a table that stands in several places counts once. "with a value" leaves out
  tables and the `type` that picks one.
- Words of docs are those of docs/ without research.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Names below the package, of modules or of packages with all that is in them. Edit them when files move.
# fmt: off
LAB = ("lab",)
ENTRIES = ("stages.score", "stages.select", "stages.train")
PIPELINE = ("pipeline",)
GROUND = ("artifacts", "builtin", "config", "console", "errors", "policy", "rewards", "seeds", "streams",
          "run_folder", "parallel", "prompts.leakage")
OTHER_STRATEGIES = tuple(f"curriculum.strategies.{name}" for name in (
    "bmc", "bots", "dots", "full", "gaussian", "gradient_norm", "learnability", "learnalign", "lze", "mid", "mopps",
    "pass_rate", "random", "similarity", "similarity_learnability", "thompson", "vcrl"))
# fmt: on

QUESTION = re.compile(r"(What|Where|Whose|How)\b")
Function = ast.FunctionDef | ast.AsyncFunctionDef
Modules = dict[str, Path]
Numbers = dict[str, int | float | str]


def read_package(package: Path) -> Modules:
    """Files by their name below the package; the package itself is the empty name."""
    names = {path: path.relative_to(package).with_suffix("").parts for path in sorted(package.rglob("*.py"))}
    return {".".join(part for part in parts if part != "__init__"): path for path, parts in names.items()}


def stands_in(name: str, places: Collection[str]) -> bool:
    """Whether a module is one of these places or lies in one. `a.b*` is every module whose name begins with a.b."""
    return any(name.startswith(p[:-1]) if p.endswith("*") else f"{name}.".startswith(f"{p}.") for p in places)


def imports(path: Path, package: str, modules: Modules) -> set[str]:
    """Modules of the package that a file imports."""
    found = list[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return {name.removeprefix(f"{package}.") for name in found if name.startswith(f"{package}.")} & set(modules)


def imported_by(entries: Collection[str], package: str, modules: Modules, stop: Collection[str] = ()) -> list[str]:
    """These modules and all that they import, directly or through others, without those to stop at."""
    if missing := set(entries) - set(modules):
        raise SystemExit(f"{package} has no {', '.join(sorted(missing))}: edit the names at the top of {__file__}")
    found, waiting = set[str](), list(entries)
    while waiting:
        name = waiting.pop()
        if name not in found and not stands_in(name, stop):
            found.add(name)
            waiting += imports(modules[name], package, modules)
    return sorted(found)


def lines(paths: Collection[Path]) -> int:
    return sum(1 for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def words(paths: Collection[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").split()) for path in paths)


def parameters(function: Function) -> int:
    named = function.args
    every = [*named.posonlyargs, *named.args, *named.kwonlyargs, *filter(None, (named.vararg, named.kwarg))]
    return sum(1 for each in every if each.arg not in ("self", "cls"))


def size_numbers(package: Path, entries: Collection[str] = ENTRIES, pipeline: Collection[str] = PIPELINE) -> Numbers:
    """Lines and files of the package, and of what a reader has to follow."""
    modules, name = read_package(package), package.name
    run = {each: imports(modules[each], name, modules) for each in imported_by(pipeline, name, modules)}
    rooms = {each.split(".")[0] for each, below in run.items() if any(stands_in(one, ("config",)) for one in below)}
    groups = {
        "outside lab": [n for n in modules if not stands_in(n, LAB)],
        "lab": [n for n in modules if stands_in(n, LAB)],
        "score -> select -> train": imported_by(entries, name, modules),
        "... without the ground": imported_by(entries, name, modules, (*GROUND, *OTHER_STRATEGIES)),
    }
    found: Numbers = {}
    for group, names in groups.items():
        paths = [modules[each] for each in names]
        found |= {f"{group}: lines": lines(paths), f"{group}: files": sum(path.name != "__init__.py" for path in paths)}
    return found | {"rooms a config passes through": len(rooms - {"config"})}


def style_numbers(package: Path) -> Numbers:
    """Lengths and parameters of functions, long modules, docstrings that begin with a question word."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in read_package(package).items()}
    nodes = [(name, node) for name, text in texts.items() for node in ast.walk(ast.parse(text))]
    functions = [(name, node) for name, node in nodes if isinstance(node, Function)]
    lengths = [(node.end_lineno or 0) - node.lineno + 1 for _, node in functions]
    most, where = max(((parameters(node), f"{name}.{node.name}") for name, node in functions), default=(0, ""))
    described = [node for _, node in nodes if isinstance(node, Function | ast.ClassDef | ast.Module)]
    return {
        "parameters of a function, largest": most,
        "... that function": where,
        "length of a function, median": statistics.median(lengths or [0]),
        "length of a function, longest": max(lengths, default=0),
        "modules over 400 lines": sum(len(text.splitlines()) > 400 for text in texts.values()),
        "docstrings that begin with What, Where, Whose, How": sum(
            bool(QUESTION.match(ast.get_docstring(node) or "")) for node in described
        ),
    }


def settings_numbers() -> Numbers:
    from config_reference import sections, tables_in  # beside this file

    from cropi.config import Config

    tables: dict[str, type[Config]] = {}
    sections(Config, "", tables)
    rows = [row for table in tables.values() for row in table.model_fields.items()]
    values = [name for name, field in rows if name != "type" and not tables_in(field.annotation)]
    return {"settings": len(rows), "settings with a value": len(values)}


def page_numbers(root: Path) -> Numbers:
    pages = [path for path in (root / "docs").rglob("*.md") if "research" not in path.relative_to(root).parts]
    return {
        "tests: lines": lines([*(root / "tests").rglob("*.py")]),
        "docs: words": words(pages),
        "README: words": words([root / "README.md"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    package = ROOT / "src" / "cropi"
    numbers = size_numbers(package) | settings_numbers() | style_numbers(package) | page_numbers(ROOT)
    if arguments.json:
        print(json.dumps(numbers, indent=2))
        return
    for name, value in numbers.items():
        print(f"{name:<52}{value:>10,}" if isinstance(value, int | float) else f"{name:<52}  {value}")


if __name__ == "__main__":
    main()
