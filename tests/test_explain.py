"""`cropi explain` through the real command, and naming a run by its folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cropi.config.loading import load_config
from cropi.errors import ConfigError
from tests.runs import SMALL, cropi_error, cropi_ok

ONE_STAGE = [*SMALL, "score.standard_errors=true", "train.stages=1", "train.steps_per_stage=2", "evaluate.every=2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one stage."""
    cwd = tmp_path_factory.mktemp("run")
    cropi_ok("run", "quickstart", *ONE_STAGE, cwd=cwd)
    return cwd / "runs" / "quickstart"


def explained(*arguments: str, cwd: Path) -> list[dict]:
    done = cropi_ok("explain", *arguments, "--json", cwd=cwd)
    return json.loads(done.stdout)["prompts"]


def test_what_is_explained_agrees_with_the_files(finished: Path, tmp_path: Path) -> None:
    selection = pq.read_table(finished / "selections/stage-000/selection.parquet").to_pylist()
    scores = {row["prompt_id"]: row for row in pq.read_table(finished / "scores/stage-000/scores.parquet").to_pylist()}
    found = explained(str(finished), *(row["prompt_id"] for row in selection), cwd=tmp_path)
    trained = [
        prompt_id
        for line in (finished / "rewards.jsonl").read_text().splitlines()
        for prompt_id in json.loads(line)["prompt_ids"]
    ]
    for row, prompt in zip(selection, found, strict=True):
        facts, scored = prompt["stages"][0], scores[row["prompt_id"]]
        assert (facts["selected"], facts["rank"], facts["status"]) == (row["selected"], row["rank"], row["status"])
        assert prompt["trained"]["completions"] == trained.count(row["prompt_id"])
        if row["status"] == "ok":
            influence = facts["influence"]["sum"]
            assert influence["value"] == scored["influence/sum"]
            assert influence["standard_error"] == scored["standard_error/sum"] > 0
            assert facts["top_probability"] == scored["top_probability"]
        if row["selected"]:
            assert facts["outcome"] == f"selected ({row['reason']})"
            assert f"(sum #{facts['influence']['sum']['rank']})" in row["reason"]


def test_the_best_without_ids_and_as_text(finished: Path, tmp_path: Path) -> None:
    done = cropi_ok("explain", str(finished), "--top", "3", cwd=tmp_path)
    assert done.stdout.count("selected (influence: #") == 3
    assert "influence: #1 (sum #1)" in done.stdout
    assert len(explained(str(finished), cwd=tmp_path)) == 10


def test_mistakes_exit_2(finished: Path, tmp_path: Path) -> None:
    for arguments, message in ((["x", "--top", "3"], "leave one of them out"), (["--stage", "1"], "give 0 to 0")):
        assert message in cropi_error("explain", str(finished), *arguments, cwd=tmp_path).stderr


def test_no_run_is_made_by_asking(tmp_path: Path) -> None:
    done = cropi_error("explain", "quickstart", cwd=tmp_path)
    assert "there is no such run" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["--help", "explain"])
def test_commands_that_read_leave_torch_out(command: str, finished: Path) -> None:
    code = "import sys, atexit, cropi.__main__; atexit.register(lambda: print(heavy & set(sys.modules)))"
    code += "; heavy = {'torch', 'matplotlib', 'transformers'}; cropi.__main__.main()"
    arguments = [command, str(finished)] if command == "explain" else [command]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


# -- a run by its folder -----------------------------------------------------------------------------------------------


def test_a_folder_names_its_run_wherever_it_is(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = tmp_path / "elsewhere" / "quickstart"
    shutil.copytree(finished, moved)
    assert load_config(str(moved)).folder == moved
    before = load_config(str(finished / "config.json"))
    assert load_config(str(moved)).model_copy(update={"run_dir": before.run_dir}) == before
    monkeypatch.chdir(moved)
    assert load_config(".").folder == moved.resolve()
    assert load_config(".", ["name=again"]).folder == moved.resolve().parent / "again"


def test_folders_that_are_no_run_or_another_are_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no config of a run"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="holds no config of a run"):
        load_config(str(tmp_path))
    shutil.copytree(finished, tmp_path / "renamed")
    with pytest.raises(ConfigError, match="'quickstart' has another name"):
        load_config(str(tmp_path / "renamed"))


def test_a_recipe_goes_before_a_folder_of_its_name(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "quickstart")
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart").train.stages == 3
    assert load_config("./quickstart").train.stages == 1
