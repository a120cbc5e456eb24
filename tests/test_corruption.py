"""Every file of a half-done run damaged in turn: what ends well is what an undisturbed run ends with, or the file is
named and nothing is done.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cropi.stages import train
from cropi.stages.run import Run
from cropi.streams import read_jsonl
from tests.runs import SMALL, cropi, cropi_error, cropi_ok, evaluations, selections

RUN = Path("runs/quickstart")
LAST = Path("checkpoints/checkpoint-6")
SETTINGS = [
    *SMALL,
    "prompts.train=[{type: builtin, families: [sum, parity], count: 12, seed: 1}]",
    "trainer.save_strategy=steps",
    "trainer.save_steps=1",
    "trainer.save_total_limit=2",
]
DAMAGES = ("flip", "cut", "empty", "remove", "swap")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a run that ends, one that was interrupted while it measured its fourth step)."""
    whole, half = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("half")
    measure = train.evaluate

    def interrupted(run: Run, model: Any, step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt
        measure(run, model, step)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "evaluate", interrupted)
        assert cropi("run", "quickstart", *SETTINGS, cwd=half).returncode == 130
    cropi_ok("run", "quickstart", *SETTINGS, cwd=whole)
    return whole, half


def results(cwd: Path) -> dict[str, object]:
    """All that an undisturbed run ends with but for what it cost."""
    trained = {"rewards": read_jsonl(cwd / RUN / "rewards.jsonl")}
    trained["weights"] = [(cwd / RUN / LAST / "model.safetensors").read_bytes()]
    summary = without_costs(json.loads((cwd / RUN / "summary.json").read_text()))
    return {**selections(cwd / RUN), **evaluations(cwd / RUN), **trained, "summary": summary}


def without_costs(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_costs(v) for key, v in value.items() if "cost" not in key and "second" not in key}
    return [without_costs(v) for v in value] if isinstance(value, list) else value


def damage(path: Path, kind: str) -> bool:
    """Damage a file; returns whether that changed it."""
    data = path.read_bytes()
    place = len(data) // 2
    match kind:
        case "flip":
            path.write_bytes(data[:place] + bytes(byte ^ 4 for byte in data[place : place + 1]) + data[place + 1 :])
        case "cut":
            path.write_bytes(data[: place + len(data) // 3])
        case "empty":
            path.write_bytes(b"")
        case "remove":
            path.unlink()
        case "swap":
            for other in siblings(path):
                if other.read_bytes() != data:
                    path.write_bytes(other.read_bytes())
                    break
    return not path.exists() or path.read_bytes() != data


def siblings(path: Path) -> Iterator[Path]:
    """Files of the same kind: in the same folder, or of the same name in others."""
    yield from sorted(other for other in path.parent.glob(f"*{path.suffix}") if other != path and other.is_file())
    root = next(parent for parent in path.parents if parent.name == RUN.name)
    yield from sorted(other for other in root.rglob(path.name) if other != path and other.is_file())


def ends_wrongly(runs: tuple[Path, Path], name: str, kind: str, cwd: Path) -> str:
    """What is wrong with how a damaged run ends; nothing if it ends well."""
    whole, half = runs
    shutil.copytree(half, cwd)
    path = cwd / name
    if not damage(path, kind):
        return ""
    for command in ("run", "report"):
        done = cropi(command, "quickstart", *SETTINGS, cwd=cwd)
        if done.returncode == 2:
            named = any(str(place) in done.stderr for place in (name, Path(name).parent))
            return "" if named and "Fix:" in done.stderr else f"{name} {kind}: is not named: {done.stderr}"
        if done.returncode:
            return f"{name} {kind}: {command} ends with {done.returncode}: {done.stderr[-2000:]}"
    ours, theirs = results(cwd), results(whole)
    differ = [key for key in theirs if ours.get(key) != theirs[key]]
    return f"{name} {kind}: ends with other {differ}" if differ or ours.keys() != theirs.keys() else ""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rewards.jsonl", "flip"), ("steps.jsonl", "remove"), ("evaluations/step-000002.parquet", "swap"),
        ("checkpoints/checkpoint-3/optimizer.pt", "swap"), ("trajectories/part-train-00000.parquet", "cut"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(runs: tuple[Path, Path], name: str, kind: str, tmp_path: Path) -> None:
    assert (runs[1] / RUN / name).is_file()
    assert ends_wrongly(runs, str(RUN / name), kind, tmp_path / "run") == ""


@pytest.mark.parametrize("key", ["trainer.learning_rate", "seed"])
def test_a_config_that_was_edited_is_refused_and_the_difference_shown(runs, key, tmp_path):
    shutil.copytree(runs[1], tmp_path / "run")
    path = tmp_path / "run" / RUN / "config.json"
    config = json.loads(path.read_text())
    table: Any = config
    for part in key.split(".")[:-1]:
        table = table[part]
    before = table[key.split(".")[-1]]
    table[key.split(".")[-1]] = before / 2 if before else 1
    path.write_text(json.dumps(config))
    for command in ("run", "report", "select"):
        done = cropi_error(command, str(RUN), cwd=tmp_path / "run")
        assert f"{key}: {json.dumps(before)} -> " in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", DAMAGES)
def test_no_damage_changes_the_result_unnoticed(runs: tuple[Path, Path], kind: str, tmp_path: Path) -> None:
    names = sorted(str(path.relative_to(runs[1])) for path in runs[1].rglob("*") if path.is_file())
    if "CROPI_DAMAGED" in os.environ:
        names = [name for name in names if os.environ["CROPI_DAMAGED"] in name]
    wrong = []
    for number, name in enumerate(names):
        place = tmp_path / str(number)
        wrong.append(ends_wrongly(runs, name, kind, place))
        shutil.rmtree(place)
    assert [text for text in wrong if text] == []
