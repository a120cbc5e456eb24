import json
from pathlib import Path

import pytest

from cropi.artifacts import finish, write_json, write_sealed
from cropi.config import SAMPLED_BY, Config
from cropi.config.loading import load_config
from cropi.errors import ArtifactError, ConfigError
from cropi.report.run_report import make_report
from cropi.run_folder import RunFolder
from tests.runs import SMALL


def config(folder: Path, seed: int) -> Config:
    return load_config("quickstart", [*SMALL, f"run_dir={folder}", f"seed={seed}"])


def claimed(folder: Path, seed: int) -> RunFolder:
    space = RunFolder(config(folder, seed))
    space.lock()
    space.unlock()
    return space


@pytest.mark.parametrize("made", ["prompts/manifest.json", "trajectories/part-train-00000.parquet"])
def test_a_run_belongs_to_the_config_that_made_something_in_it(tmp_path: Path, made: str) -> None:
    """One that was refused before, for its data say, may be started again with another config."""
    folder = claimed(tmp_path, 0).folder
    claimed(tmp_path, 1)
    assert json.loads((folder / "config.json").read_text())["seed"] == 1
    (folder / made).parent.mkdir()
    (folder / made).write_text("")
    with pytest.raises(ConfigError, match="seed: 1 -> 2"):
        claimed(tmp_path, 2)
    assert json.loads((folder / "config.json").read_text())["seed"] == 1


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_process_that_is_refused_or_only_reads_writes_nothing(tmp_path: Path) -> None:
    running = RunFolder(config(tmp_path, 0))
    running.lock()
    before = files(tmp_path)
    with pytest.raises(ArtifactError, match="another process is working on this run"):
        RunFolder(config(tmp_path, 1)).lock()
    make_report(RunFolder(config(tmp_path, 0)))
    assert {name for name in files(tmp_path) if name not in before} == {
        str(running.folder / name) for name in ("report.html", "report.md", "summary.json")
    }
    assert files(tmp_path).items() >= before.items()


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "thesis.tex").write_text("dear")
    with pytest.raises(ArtifactError, match="exists and is not a run"):
        claimed(tmp_path, 0)
    assert [path.name for path in (tmp_path / "quickstart").iterdir()] == ["thesis.tex"]


STAGE_SETTINGS = [
    "trainer.learning_rate=5e-4",
    "trainer.per_device_train_batch_size=64",
    "collect.temperature=0.7",
    "seed=7",
    "select.fraction=0.5",
    "select.strategy={type: influence, static: true}",
    "train.steps_per_stage=4",
    "policy.cpu_threads=2",
    "verification.seconds=9",
    "evaluate.samples=2",
    "score.mask=uniform",
]
FREE_SETTINGS = ["verification.processes=1", "trainer.logging_steps=3", "trainer.save_total_limit=5"]


CHECKPOINT = "checkpoints/checkpoint-2"


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        *((setting, CHECKPOINT) for setting in (*STAGE_SETTINGS, *FREE_SETTINGS)),
        *((STAGE_SETTINGS[0], place) for place in ("scores/stage-000", "evaluations")),
    ],
)
def test_artifacts_of_stages_know_the_settings_that_made_them(tmp_path: Path, place: str, setting: str) -> None:
    space = claimed(tmp_path, 0)
    made = space.folder / place
    made.mkdir(parents=True)
    finish(made, "thing", inputs={"settings": space.settings()}, counts={})
    edited = load_config("quickstart", [*SMALL, f"run_dir={tmp_path}", setting])
    write_json(space.folder / "config.json", edited.resolved())
    if setting in FREE_SETTINGS:
        RunFolder(edited).lock()
        return
    with pytest.raises(ConfigError, match="was made with other settings") as refused:
        RunFolder(edited)
    assert setting.split("=")[0] in str(refused.value)
    assert place in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "tables", "refused", "free"),
    [
        ("prompts", ("prompts",), "prompts.system_prompt=x", "trainer.learning_rate=5e-4"),
        ("trajectories", SAMPLED_BY, "collect.temperature=0.7", "trainer.learning_rate=5e-4"),
        ("trajectories", SAMPLED_BY, "verifier={type: numeric}", "evaluate.samples=3"),
        ("evaluations", (*SAMPLED_BY, "evaluate"), "evaluate.samples=3", "score.score=cosine"),
    ],
)
@pytest.mark.parametrize("mark", ["manifest.json", "inputs.json"])
def test_artifacts_before_training_depend_on_fewer_settings(tmp_path, kind, tables, refused, free, mark):
    space = claimed(tmp_path, 0)
    write_sealed(space.folder / kind / mark, {"inputs": {"settings": space.settings(*tables)}})
    for setting in (free, refused):
        edited = load_config("quickstart", [*SMALL, f"run_dir={tmp_path}", setting])
        write_json(space.folder / "config.json", edited.resolved())
        if setting == free:
            RunFolder(edited)
        else:
            with pytest.raises(ConfigError, match=setting.split("=")[0]):
                RunFolder(edited)
