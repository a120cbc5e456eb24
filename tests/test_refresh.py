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
from cropi.pipeline import Pipeline
from cropi.rollouts.overlay import FRESH
from cropi.stages import collect
from cropi.stages.refreshing import Refresher
from cropi.stages.train import StageCallback
from tests.runs import SMALL, cropi, evaluations, judge, selections

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
    "baselines=[{type: learnability, rescore: true}]",
    f"trainer.num_generations={GENERATIONS}",
    "trainer.per_device_train_batch_size=16",
    "trainer.learning_rate=3e-4",
]
ARMS = ["influence", "learnability"]


@contextmanager
def opened(folder: Path) -> Iterator[Pipeline]:
    """The run in a folder, as one process after another has it."""
    pipeline = Pipeline(load_config("quickstart", [*REFRESHED, f"run_dir={folder}"]))
    try:
        yield pipeline
    finally:
        pipeline.space.unlock()


def train(folder: Path, arms: list[str]) -> Path:
    with opened(folder) as pipeline:
        pipeline.collect()
        for name in arms:
            pipeline.train(pipeline.space.arms[name])
    return folder / "quickstart"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run with refreshed trajectories."""
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("refreshed"), ARMS)


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


def rollouts(arm: Path, stage: int) -> Groups:
    """The newest group of every prompt in the files of one stage's training."""
    newest: Groups = {}
    for path in parts(arm / "rollouts"):
        if stage * STEPS <= int(path.name.split("-")[1]) < (stage + 1) * STEPS:
            newest |= groups(path)
    return newest


def newest(run: Path, arm: Path, stage: int) -> Groups:
    """What a stage should see, put together from the files."""
    found = groups(*parts(run / "trajectories"))
    for number in range(1, stage + 1):
        found |= rollouts(arm, number - 1) | groups(*parts(arm / f"stages/{number:03}/fresh"))
    return found


def rewards(rows: list[dict[str, Any]]) -> list[float]:
    assert len(rows) == GENERATIONS
    return [row["reward"] for row in rows]


@pytest.mark.parametrize("name", ARMS)
def test_every_stage_sees_the_newest_group_of_every_prompt(finished: Path, name: str) -> None:
    arm, base, changed = finished / "arms" / name, newest(finished, finished, 0), 0
    for stage in range(3):
        expected = newest(finished, arm, stage)
        rows = pq.read_table(arm / f"stages/{stage:03}/selection/selection.parquet").to_pylist()
        assert len(rows) == len(expected) == PROMPTS
        for row in rows:
            values = rewards(expected[row["prompt_id"]])
            assert row["pass_rate"] == sum(values) / len(values)
            assert row["status"] == ("ok" if len(set(values)) > 1 else "no_signal")
            changed += values != rewards(base[row["prompt_id"]])
    assert changed > 10


def test_influence_is_taken_at_the_newest_groups(finished: Path) -> None:
    arm, here, others = finished / "arms/influence", [], []
    for stage in (1, 2):
        fresh, expected = groups(*parts(arm / f"stages/{stage:03}/fresh")), newest(finished, arm, stage)
        assert len(fresh) == math.ceil(0.25 * PROMPTS)
        for row in pq.read_table(arm / f"stages/{stage:03}/scores/scores.parquet").to_pylist():
            assert row["completion_tokens"] == sum(len(r["completion_ids"]) for r in expected[row["prompt_id"]])
            if row["status"] == "ok":
                (here if row["prompt_id"] in fresh else others).append(row["kl"])
    # Sampled by the policy that scores: every ratio is 1. The others are of policies that have moved.
    assert here
    assert max(here) < 1e-9 < 1e-7 < min(others)


@pytest.mark.parametrize("name", ARMS)
def test_half_of_the_places_go_to_groups_without_signal_and_none_to_what_was_reused(finished: Path, name: str) -> None:
    arm, needed = finished / "arms" / name, 0
    for stage in (1, 2):
        reused = groups(*parts(arm / f"stages/{stage:03}/rollouts"))
        assert reused == rollouts(arm, stage - 1)
        before = newest(finished, arm, stage - 1) | reused
        silent = {i for i, rows in before.items() if len(set(rewards(rows))) == 1} - set(reused)
        fresh = set(groups(*parts(arm / f"stages/{stage:03}/fresh")))
        assert len(fresh & silent) >= min(3, len(silent))
        assert not fresh & set(reused)
        needed += len(silent)
    assert needed


def test_the_arm_pays_for_what_is_sampled_anew(finished: Path) -> None:
    charged = [entry for entry in Ledger(finished / "ledger.jsonl").entries() if entry["phase"] == "collect"]
    assert {(e["arm"], e["stage"]) for e in charged} == {("", None), *((arm, s) for arm in ARMS for s in (1, 2))}
    for name in ARMS:
        sampled = groups(*(p for s in (1, 2) for p in parts(finished / f"arms/{name}/stages/{s:03}/fresh")))
        tokens = sum(len(row["completion_ids"]) for rows in sampled.values() for row in rows)
        assert tokens == sum(entry["tokens"] for entry in charged if entry["arm"] == name)


def test_what_was_made_from_other_trajectories_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "quickstart")
    stage = tmp_path / "quickstart/arms/influence/stages/002"
    manifest = read_manifest(stage / "fresh", FRESH, made_by="")
    next((stage / "fresh").glob("part-*")).unlink()
    finish(stage / "fresh", manifest.kind, inputs=manifest.inputs, counts=manifest.counts)
    with opened(tmp_path) as pipeline:
        arm = pipeline.space.arms["influence"]
        with pytest.raises(ArtifactError, match="was made from another refresh") as of_scores:
            pipeline.score(arm, 2, pipeline.base.model, "influence after step 4")
        with pytest.raises(ArtifactError, match="was made from another refresh") as of_selection:
            pipeline.select(arm, 2)
        assert ("stages/002/scores" in str(of_scores.value), "002/selection" in str(of_selection.value)) == (True, True)
    (stage / "rollouts/manifest.json").unlink()
    with opened(tmp_path) as pipeline:
        arm = pipeline.space.arms["influence"]
        pipeline.select(arm, 1)
        with pytest.raises(ArtifactError, match="no finished rollouts artifact") as caught:
            pipeline.select(arm, 2)
        assert "run `cropi train` first" in str(caught.value)


class Killed(BaseException):
    """Stands for the end of the process."""


def files_of_trajectories(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("arms/influence/**/part-*.parquet"))}


def of_influence(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if path.startswith("arms/influence")}


def test_ended_while_sampling_and_while_training_it_ends_like_undisturbed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write, end_step = [], collect.write_table, StageCallback.on_step_end

    def writing(path: Path, *rest: Any) -> None:
        if path.parent.name == "fresh":
            written.append(path)
            if len(written) == 2:
                raise Killed
        write(path, *rest)

    def ending(callback: StageCallback, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == STEPS + 1:
            raise Killed
        end_step(callback, args, state, control, **more)

    for target, name, replacement in ((collect, "write_table", writing), (StageCallback, "on_step_end", ending)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, replacement)
            with pytest.raises(Killed):
                train(tmp_path, ["influence"])
    arm = tmp_path / "quickstart/arms/influence"
    assert len(parts(arm / "rollouts")) == STEPS + 1  # one that has to be made anew
    ours = train(tmp_path, ["influence"])
    assert selections(ours) == of_influence(selections(finished))
    assert len(selections(ours)) == 3 * 2
    assert files_of_trajectories(ours) == files_of_trajectories(finished)
    assert of_influence(evaluations(ours)) == of_influence(evaluations(finished))


def test_a_policy_far_from_its_trajectories_is_warned_of(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "quickstart")
    path = tmp_path / "quickstart/arms/influence/stages/001/scores/manifest.json"
    manifest = read_sealed(path)
    manifest["details"]["drift"] = {"ratio_ess": 0.25, "clip_share": 0.1, "kl": 0.01}
    write_sealed(path, manifest)
    with opened(tmp_path) as pipeline:
        arm = pipeline.space.arms["influence"]
        capsys.readouterr()
        for stage in (0, 1):
            pipeline.score(arm, stage, pipeline.base.model, pipeline._origin(arm, stage))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(said) == 1
    assert "stage 1: the policy has moved far" in said[0]
    assert "keeps 25% of its effective" in said[0]


def test_a_refresh_that_no_arm_reads_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for strategy in ("random", "influence"):
        settings = [*REFRESHED, "baselines=[]", f"select.strategy.type={strategy}", f"run_dir={tmp_path / strategy}"]
        pipeline = Pipeline(load_config("quickstart", settings))
        pipeline.space.unlock()
        assert ("refresh has no effect" in capsys.readouterr().err) == (strategy == "random")


@pytest.mark.slow
def test_killed_five_times_it_ends_like_undisturbed(finished: Path, tmp_path: Path) -> None:
    def exists(pattern: str) -> Callable[[], bool]:
        return lambda: any((tmp_path / "runs/quickstart/arms/influence").glob(pattern))

    moments = [
        exists("rollouts/part-000001-*"),
        exists("stages/001/rollouts/part-*"),
        exists("stages/001/fresh/part-*"),
        exists(f"rollouts/part-{STEPS + 1:06}-*"),
        exists("stages/002/fresh/manifest.json"),
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
    done = cropi(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours = tmp_path / "runs/quickstart"
    assert selections(ours) == selections(finished)
    assert files_of_trajectories(ours) == files_of_trajectories(finished)


def test_validation_sets_are_sampled_anew(tmp_path: Path) -> None:
    """By the policy of the stage, for the strategies that score by them; and read back after a stop."""
    overrides = [*REFRESHED, "refresh={validation: true}", "train.stages=2", f"run_dir={tmp_path}"]
    torch.set_num_threads(1)
    pipeline = Pipeline(load_config("quickstart", overrides))
    pipeline.collect()
    for arm in pipeline.space.arms.values():
        pipeline.train(arm)
    run = tmp_path / "quickstart"
    fresh = run / "arms/influence/stages/001/fresh_validation"
    assert not (run / "arms/learnability/stages/001/fresh_validation").exists()
    rows = [row for path in parts(fresh) for row in pq.read_table(path).to_pylist()]
    base = [row for path in parts(run / "trajectories") for row in pq.read_table(path).to_pylist()]
    stored = [row for row in base if row["set"] == "validation/sum"]
    assert {row["prompt_id"] for row in rows} == {row["prompt_id"] for row in stored}
    assert len(rows) == len(stored)
    assert [row["completion_ids"] for row in rows] != [row["completion_ids"] for row in stored]
    scores = json.loads((run / "arms/influence/stages/001/scores/manifest.json").read_text())
    made = read_manifest(fresh, FRESH, made_by="")
    assert scores["inputs"]["validation"] == made.identity
    arm = pipeline.space.arms["influence"]
    tables = pipeline.trajectories.tables(arm, 1)
    assert tables["validation/sum"].num_rows == len(rows)
    assert set(tables["validation/sum"].column("completion").to_pylist()) == {row["completion"] for row in rows}
    assert tables["train"].equals(pipeline.trajectories.base["train"])
    assert pipeline.trajectories.tables(arm, 0)["validation/sum"].equals(pipeline.trajectories.base["validation/sum"])
    pipeline.space.unlock()


def test_a_solved_validation_set_keeps_its_old_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*REFRESHED, "refresh={validation: true}", "train.stages=2", "baselines=[]", f"run_dir={tmp_path}"]
    torch.set_num_threads(1)
    pipeline = Pipeline(load_config("quickstart", overrides))
    pipeline.collect()
    solved = judge(lambda *_: "correct")
    monkeypatch.setattr(
        "cropi.pipeline.Refresher", lambda space, trajectories, _: Refresher(space, trajectories, solved)
    )
    arm = pipeline.space.arms["influence"]
    pipeline.train(arm)
    assert "solves each prompt of validation/sum in all tries or in none" in capsys.readouterr().err
    tables = pipeline.trajectories.tables(arm, 1)
    assert tables["validation/sum"].equals(pipeline.trajectories.base["validation/sum"])
    pipeline.space.unlock()
