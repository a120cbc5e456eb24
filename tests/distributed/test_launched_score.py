"""Scoring by two processes of the real launcher: the scores of one, byte by byte, hence the same selection."""

import shutil
from pathlib import Path

import pytest
from tests.distributed.launching import launch
from tests.runs import SMALL, cropi, cropi_ok

from cropi.artifacts import write_json
from cropi.loading import load_config

pytestmark = pytest.mark.slow

RUN = Path("runs/quickstart")

# Three parts of scores, and two pieces of every half of the validation set.
POOL = [
    *SMALL[3:],
    "prompts.train=[{type: builtin, families: [sum, parity, count, machine], count: 48, seed: 1, label_noise: 0.25}]",
    "prompts.validation={sum: [{type: builtin, families: [sum], count: 40, seed: 2}]}",
    SMALL[2],
]
WAYS = {
    "influence": [],
    "with errors": ["score.standard_errors=true"],
    "learnalign": ["select.strategy={type: learnalign}"],
    "exact": ["score.estimator=exact"],
    "autograd": ["score.estimator=reference", "select.strategy={type: influence}"],
}


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the trajectories that all share."""
    cwd = tmp_path_factory.mktemp("collected")
    cropi_ok("collect", "quickstart", *POOL, cwd=cwd)
    return cwd


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_score_as_one(way: str, collected: Path, tmp_path: Path) -> None:
    settings = [*POOL, *WAYS[way]]
    for processes in (1, 2):
        cwd = tmp_path / str(processes)
        shutil.copytree(collected, cwd)
        write_json(cwd / RUN / "config.json", load_config("quickstart", settings).resolved())
        if processes == 1:
            done = cropi("score", "quickstart", *settings, cwd=cwd)
        else:
            done = launch(2, "score", "quickstart", *settings, cwd=cwd)
        assert done.returncode == 0, done.stderr
        cropi_ok("select", "quickstart", *settings, cwd=cwd)
    one, two = (made(tmp_path / processes) for processes in ("1", "2"))
    assert {"scores.parquet", "selected.jsonl"} <= {path.name for path in one}
    assert two == one


def made(cwd: Path) -> dict[Path, bytes]:
    """Scores, features and selections."""
    paths = [path for name in ("scores", "selections") for path in (cwd / RUN / name).rglob("*")]
    return {path.relative_to(cwd): path.read_bytes() for path in paths if path.is_file()}
