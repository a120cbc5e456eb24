"""Runs whose trajectories are refreshed: what later stages see, and that an interruption changes nothing."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from cropi.artifacts import finish, read_manifest, read_sealed, write_sealed
from cropi.errors import ArtifactError
from cropi.ledger import Ledger
from cropi.loading import load_config
from cropi.pipeline import score_stage, train_all
from cropi.rollouts import shards
from cropi.stages.collect import Collector, collect
from cropi.stages.run import Run
from cropi.stages.select import select
from cropi.stages.train import StageCallback
from cropi.stages.trajectories import FRESH
from tests.runs import SMALL, cropi_ok, evaluations, judge, selections

STEPS, PROMPTS, GENERATIONS = 2, 24, 4
REFRESHED = [
    *SMALL,
    "prompts.train=[{type: builtin, families: [sum, parity, count, machine], count: 6, seed: 1, label_noise: 0.25}]",
    "prompts.test={sum: {sources: [{type: builtin, families: [sum], count: 4, seed: 3}]}}",
    f"collect.num_generations={GENERATIONS}",
    "collect.shard_prompts=4",
    "score.standard_errors=false",
    "train.stages=3",
    f"train.steps_per_stage={STEPS}",
    f"evaluate.every={STEPS}",
    "refresh={fraction: 0.25, reuse_rollouts: true}",
    f"trainer.num_generations={GENERATIONS}",
    "trainer.per_device_train_batch_size=16",
    "trainer.learning_rate=3e-4",
]
LEARNABILITY = "select.strategy={type: learnability, rescore: true}"


@contextmanager
def opened(folder: Path, *overrides: str) -> Iterator[Run]:
    """The run in a folder, as one process after another has it."""
    run = Run(load_config("quickstart", [*REFRESHED, *overrides, f"run_dir={folder}"]))
    try:
        yield run
    finally:
        run.folder.unlock()


def train(folder: Path, *overrides: str) -> Path:
    with opened(folder, *overrides) as run:
        collect(run)
        train_all(run)
    return folder / "quickstart"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run with refreshed trajectories."""
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("refreshed"))


@pytest.fixture(scope="module")
def learnability(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same under a strategy without scores."""
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("learnability"), LEARNABILITY)


Groups = dict[str, list[dict[str, Any]]]


def groups(*paths: Path) -> Groups:
    found: Groups = {}
    for path in paths:
        for row in pq.read_table(path).to_pylist():
            if row["set"] == "train":
                found.setdefault(row["prompt_id"], []).append(row)
    return found


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def rollouts(run: Path, stage: int) -> Groups:
    """The newest group of every prompt in the files of one stage's training."""
    newest: Groups = {}
    for path in parts(run / "rollouts"):
        if stage * STEPS <= int(path.name.split("-")[1]) < (stage + 1) * STEPS:
            newest |= groups(path)
    return newest


def newest(run: Path, stage: int) -> Groups:
    """What a stage should see, put together from the files."""
    found = groups(*parts(run / "trajectories"))
    for number in range(1, stage + 1):
        found |= rollouts(run, number - 1) | groups(*parts(run / f"fresh/stage-{number:03}"))
    return found


def rewards(rows: list[dict[str, Any]]) -> list[float]:
    assert len(rows) == GENERATIONS
    return [row["reward"] for row in rows]


@pytest.mark.parametrize("name", ["finished", "learnability"])
def test_every_stage_sees_the_newest_group_of_every_prompt(name: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(name)
    base, changed = newest(run, 0), 0
    for stage in range(3):
        expected = newest(run, stage)
        rows = pq.read_table(run / f"selections/stage-{stage:03}/selection.parquet").to_pylist()
        assert len(rows) == len(expected) == PROMPTS
        for row in rows:
            values = rewards(expected[row["prompt_id"]])
            assert row["pass_rate"] == sum(values) / len(values)
            assert row["status"] == ("ok" if len(set(values)) > 1 else "no_signal")
            changed += values != rewards(base[row["prompt_id"]])
    assert changed > 10


def test_influence_is_taken_at_the_newest_groups(finished: Path) -> None:
    here, others = [], []
    for stage in (1, 2):
        fresh, expected = groups(*parts(finished / f"fresh/stage-{stage:03}")), newest(finished, stage)
        assert len(fresh) == math.ceil(0.25 * PROMPTS)
        for row in pq.read_table(finished / f"scores/stage-{stage:03}/scores.parquet").to_pylist():
            assert row["completion_tokens"] == sum(len(r["completion_ids"]) for r in expected[row["prompt_id"]])
            if row["status"] == "ok":
                (here if row["prompt_id"] in fresh else others).append(row["kl"])
    # Sampled by the policy that scores: every ratio is 1. The others are of policies that have moved.
    assert here
    assert max(here) < 1e-9 < 1e-7 < min(others)


@pytest.mark.parametrize("name", ["finished", "learnability"])
def test_half_of_the_places_go_to_groups_without_signal_and_none_to_what_was_reused(
    name: str, request: pytest.FixtureRequest
) -> None:
    run, needed = request.getfixturevalue(name), 0
    for stage in (1, 2):
        reused = groups(*parts(run / f"reused/stage-{stage:03}"))
        assert reused == rollouts(run, stage - 1)
        before = newest(run, stage - 1) | reused
        silent = {i for i, rows in before.items() if len(set(rewards(rows))) == 1} - set(reused)
        fresh = set(groups(*parts(run / f"fresh/stage-{stage:03}")))
        assert len(fresh & silent) >= min(3, len(silent))
        assert not fresh & set(reused)
        needed += len(silent)
    assert needed


def test_the_ledger_holds_what_is_sampled_again(finished: Path) -> None:
    charged = [entry for entry in Ledger(finished / "ledger.jsonl").entries() if entry["phase"] == "collect"]
    assert {entry["stage"] for entry in charged} == {None, 1, 2}
    for stage in (1, 2):
        sampled = groups(*parts(finished / f"fresh/stage-{stage:03}"))
        tokens = sum(len(row["completion_ids"]) for rows in sampled.values() for row in rows)
        assert tokens == sum(entry["tokens"] for entry in charged if entry["stage"] == stage)


def test_what_was_made_from_other_trajectories_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "quickstart")
    fresh = tmp_path / "quickstart/fresh/stage-002"
    manifest = read_manifest(fresh, FRESH, made_by="")
    next(fresh.glob("part-*")).unlink()
    finish(fresh, manifest.kind, inputs=manifest.inputs, counts=manifest.counts)
    with opened(tmp_path) as pipeline:
        with pytest.raises(ArtifactError, match="was made from another refresh") as of_scores:
            score_stage(pipeline, 2, pipeline.base.model, "influence after step 4")
        with pytest.raises(ArtifactError, match="was made from another refresh") as of_selection:
            select(pipeline, 2)
        assert "scores/stage-002" in str(of_scores.value)
        assert "selections/stage-002" in str(of_selection.value)
    (tmp_path / "quickstart/reused/stage-002/manifest.json").unlink()
    with opened(tmp_path) as pipeline:
        select(pipeline, 1)
        with pytest.raises(ArtifactError, match="no finished rollouts artifact") as caught:
            select(pipeline, 2)
        assert "run `cropi train` first" in str(caught.value)


class Killed(BaseException):
    """Stands for the end of the process."""


def files_of_trajectories(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("**/part-*.parquet"))}


def test_ended_while_sampling_and_while_training_it_ends_like_undisturbed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write, end_step = [], shards.write_table, StageCallback.on_step_end

    def writing(path: Path, *rest: Any) -> None:
        if path.parent.parent.name == "fresh":
            written.append(path)
            if len(written) == 2:
                raise Killed
        write(path, *rest)

    def ending(callback: StageCallback, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == STEPS + 1:
            raise Killed
        end_step(callback, args, state, control, **more)

    for target, name, replacement in ((shards, "write_table", writing), (StageCallback, "on_step_end", ending)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, replacement)
            with pytest.raises(Killed):
                train(tmp_path)
    assert len(parts(tmp_path / "quickstart/rollouts")) == STEPS + 1  # one that has to be made anew
    ours = train(tmp_path)
    assert selections(ours) == selections(finished)
    assert len(selections(ours)) == 3 * 2
    assert files_of_trajectories(ours) == files_of_trajectories(finished)
    assert evaluations(ours) == evaluations(finished)


def test_a_policy_far_from_its_trajectories_is_warned_of(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "quickstart")
    path = tmp_path / "quickstart/scores/stage-001/manifest.json"
    manifest = read_sealed(path)
    manifest["details"]["drift"] = {"ratio_ess": 0.25, "clip_share": 0.1, "kl": 0.01}
    write_sealed(path, manifest)
    with opened(tmp_path) as pipeline:
        capsys.readouterr()
        for stage in (0, 1):
            score_stage(pipeline, stage, pipeline.base.model, pipeline.origin(stage))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(said) == 1
    assert "stage 1: the policy has moved far" in said[0]
    assert "keeps 25% of its effective" in said[0]


def test_a_refresh_that_nothing_reads_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for strategy in ("random", "influence"):
        settings = [*REFRESHED, f"select.strategy.type={strategy}", f"run_dir={tmp_path / strategy}"]
        pipeline = Run(load_config("quickstart", settings))
        pipeline.folder.unlock()
        assert ("refresh has no effect" in capsys.readouterr().err) == (strategy == "random")


@pytest.mark.slow
def test_killed_five_times_it_ends_like_undisturbed(finished: Path, tmp_path: Path) -> None:
    def exists(pattern: str) -> Callable[[], bool]:
        return lambda: any((tmp_path / "runs/quickstart").glob(pattern))

    moments = [
        exists("rollouts/part-000001-*"),
        exists("reused/stage-001/part-*"),
        exists("fresh/stage-001/part-*"),
        exists(f"rollouts/part-{STEPS + 1:06}-*"),
        exists("fresh/stage-002/manifest.json"),
    ]
    command = ["run", "quickstart", *REFRESHED]
    for moment in moments:
        process = subprocess.Popen(
            [sys.executable, "-m", "cropi", *command], cwd=tmp_path, stderr=subprocess.DEVNULL, env=os.environ
        )
        while not moment():
            assert process.poll() is None, "the run ended before the moment came"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
    cropi_ok(*command, cwd=tmp_path)
    ours = tmp_path / "runs/quickstart"
    assert selections(ours) == selections(finished)
    assert files_of_trajectories(ours) == files_of_trajectories(finished)


def test_validation_sets_are_sampled_anew(tmp_path: Path) -> None:
    """By the policy of the stage, for the strategies that score by them; and read back after a stop."""
    overrides = [*REFRESHED, "refresh={validation: true}", "train.stages=2", f"run_dir={tmp_path}"]
    torch.set_num_threads(1)
    pipeline = Run(load_config("quickstart", overrides))
    collect(pipeline)
    train_all(pipeline)
    run = tmp_path / "quickstart"
    fresh = run / "fresh-validation/stage-001"
    rows = [row for path in parts(fresh) for row in pq.read_table(path).to_pylist()]
    base = [row for path in parts(run / "trajectories") for row in pq.read_table(path).to_pylist()]
    stored = [row for row in base if row["set"] == "validation/sum"]
    assert {row["prompt_id"] for row in rows} == {row["prompt_id"] for row in stored}
    assert len(rows) == len(stored)
    assert [row["completion_ids"] for row in rows] != [row["completion_ids"] for row in stored]
    scores = json.loads((run / "scores/stage-001/manifest.json").read_text())
    made = read_manifest(fresh, FRESH, made_by="")
    assert scores["inputs"]["validation"] == made.identity
    tables = pipeline.trajectories.tables(1)
    assert tables["validation/sum"].num_rows == len(rows)
    assert set(tables["validation/sum"].column("completion").to_pylist()) == {row["completion"] for row in rows}
    assert tables["train"].equals(pipeline.trajectories.base["train"])
    assert pipeline.trajectories.tables(0)["validation/sum"].equals(pipeline.trajectories.base["validation/sum"])
    pipeline.folder.unlock()


def test_a_solved_validation_set_keeps_its_old_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*REFRESHED, "refresh={validation: true}", "train.stages=2", f"run_dir={tmp_path}"]
    torch.set_num_threads(1)
    pipeline = Run(load_config("quickstart", overrides))
    collect(pipeline)
    solved = judge(lambda *_: "correct")
    monkeypatch.setattr(
        "cropi.stages.refresh.collector",
        lambda run, policy: Collector(run.config, policy, solved, run.ledger),
    )
    train_all(pipeline)
    assert "solves each prompt of validation/sum in all tries or in none" in capsys.readouterr().err
    tables = pipeline.trajectories.tables(1)
    assert tables["validation/sum"].equals(pipeline.trajectories.base["validation/sum"])
    pipeline.folder.unlock()
