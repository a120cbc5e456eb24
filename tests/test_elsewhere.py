"""Collecting and scoring by workers elsewhere: the bytes of one process, whatever the order and the interruptions."""

from __future__ import annotations

import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cropi.artifacts import write_json
from cropi.errors import ConfigError, UserError
from cropi.loading import load_config
from cropi.pipeline import score_stage
from cropi.policy import Policy, load_policy
from cropi.stages.collect import collect
from cropi.stages.run import Run
from cropi.stages.select import select
from cropi.workers import Workers
from tests.elsewhere import Here
from tests.runs import SMALL

RUN = [*SMALL, "collect.shard_prompts=8"]

# 68 of 72 training prompts have a signal: two parts.
POOL = [
    *RUN[1:],
    "prompts.train=[{type: builtin, families: [sum, parity, count, machine], count: 18, seed: 1, label_noise: 0.25}]",
]
WAYS = {
    "influence": [],
    "pooled": ["select.strategy={type: pooled}"],
    "exact": ["score.estimator=exact"],
}
MORE_WAYS = {
    "uniform": ["score.projection.mask=uniform"],
    "with errors": ["score.standard_errors=true"],
    "learnalign": ["select.strategy={type: learnalign}"],
    "autograd": ["score.estimator=reference"],
    "adapters": ["policy.lora={r: 2, alpha: 4}"],
    "bfloat16": ["policy.dtype=bfloat16"],
}


def pipeline(folder: Path, *overrides: str, workers: Workers | None = None) -> Run:
    torch.set_num_threads(1)
    return Run(load_config("quickstart", [*overrides, f"run_dir={folder}"]), workers=workers)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tokens(run: Run) -> list[Any]:
    names = ("phase", "passes", "tokens", "prompt_tokens")
    return sorted([entry[name] for name in names] for entry in run.folder.ledger.entries())


def test_shards_made_elsewhere_are_those_of_one_process_and_outlive_an_interruption(tmp_path: Path) -> None:
    alone = pipeline(tmp_path / "alone", *RUN)
    collect(alone)
    killed = Here(stop=3)
    run = pipeline(tmp_path / "run", *RUN, workers=killed)
    with pytest.raises(KeyboardInterrupt):
        collect(run)
    run.folder.unlock()
    parts = {path: path.stat().st_mtime_ns for path in run.folder.trajectories.glob("part-*")}
    assert len(parts) == 3
    workers = Here()
    again = pipeline(tmp_path / "run", *RUN, workers=workers)
    collect(again)
    assert len(workers.made) == 4
    assert all(path.stat().st_mtime_ns == before for path, before in parts.items())
    assert files(again.folder.trajectories) == files(alone.folder.trajectories)
    assert tokens(again) == tokens(alone)
    charged = sum(entry["seconds"] for entry in again.folder.ledger.entries())
    assert charged == pytest.approx(workers.seconds + killed.seconds)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected")
    run = pipeline(folder, *POOL)
    collect(run)
    run.folder.unlock()
    return folder / "quickstart"


def scored(collected: Path, folder: Path, overrides: list[str], workers: Workers | None) -> dict[str, bytes]:
    """Scores and selection, by trajectories that all share but for those of another policy."""
    config = load_config("quickstart", [*POOL, *overrides, f"run_dir={folder}"])
    if config.policy == load_config("quickstart", POOL).policy and not config.folder.exists():
        shutil.copytree(collected, config.folder)
        write_json(config.folder / "config.json", config.resolved())
    run = pipeline(folder, *POOL, *overrides, workers=workers)
    collect(run)
    score_stage(run, 0, run.base.model, "base")
    select(run, 0)
    run.folder.unlock()
    return files(run.paths.folder)


@pytest.mark.parametrize("way", [*WAYS, *(pytest.param(way, marks=pytest.mark.slow) for way in MORE_WAYS)])
def test_parts_made_elsewhere_are_those_of_one_process(way: str, collected: Path, tmp_path: Path) -> None:
    workers, settings = Here(), {**WAYS, **MORE_WAYS}[way]
    alone = scored(collected, tmp_path / "alone", settings, None)
    assert scored(collected, tmp_path / "elsewhere", settings, workers) == alone
    assert workers.made[-2:] == [1, 0]


def test_scoring_goes_on_where_it_stopped_and_charges_the_workers(collected: Path, tmp_path: Path) -> None:
    alone = scored(collected, tmp_path / "alone", [], None)
    with pytest.raises(KeyboardInterrupt):
        scored(collected, tmp_path / "run", [], Here(stop=1))
    workers = Here()
    run = pipeline(tmp_path / "run", *POOL, workers=workers)
    score_stage(run, 0, run.base.model, "base")
    select(run, 0)
    assert workers.made == [0]
    assert files(run.paths.folder) == alone
    phases = [entry["phase"] for entry in run.folder.ledger.entries()]
    assert [phase for phase in phases if phase != "collect"] == ["score", "score", "select"]


def test_a_checkpoint_s_weights_travel_with_the_order(collected: Path, tmp_path: Path) -> None:
    policy = load_policy(load_config("quickstart", POOL).policy)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    policy.model.save_pretrained(tmp_path / "checkpoint")
    policy.tokenizer.save_pretrained(tmp_path / "checkpoint")
    found = []
    for place, workers in (("alone", None), ("elsewhere", Here())):
        shutil.copytree(
            collected, tmp_path / place / "quickstart", ignore=shutil.ignore_patterns("scores", "selections")
        )
        run = pipeline(tmp_path / place, *POOL, workers=workers)
        run = run.at_checkpoint(0, tmp_path / "checkpoint")
        asked, origin = run.policy_at(0, tmp_path / "checkpoint")
        assert isinstance(asked, Policy)
        score_stage(run, 0, asked.model, origin)
        found.append(files(run.paths.folder))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("setting", "said"),
    [("score.store=float32", "the feature store is written")],
)
def test_scores_that_need_each_other_are_refused(setting: str, said: str, collected: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        scored(collected, tmp_path, [setting], Here())


def test_an_engine_of_the_workers_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = ModuleType("vllm")
    installed.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", installed)
    run = pipeline(tmp_path, *RUN, "collect.vllm={}", workers=Here())
    with pytest.raises(ConfigError, match="vllm serve"):
        collect(run)


def test_a_verifier_that_workers_lack_is_said_as_anywhere(tmp_path: Path) -> None:
    run = pipeline(tmp_path, *RUN, "verifier={type: function, path: nowhere.at_all}", workers=Here())
    with pytest.raises(UserError, match=r"verifier: the verifier cannot be set up: .*nowhere.* \(on .+\)"):
        collect(run)
