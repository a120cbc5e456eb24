"""The newest group wins: layers over the base trajectories, by hand."""

from pathlib import Path
from typing import Any

import pyarrow as pa
from cropi.training.rollout_recorder import keep_rollouts

from cropi.artifacts import TRAJECTORIES, finish, write_table
from cropi.curriculum.strategies import (
    FullStrategy,
    InfluenceStrategy,
    LearnabilityStrategy,
    PassRateStrategy,
    RandomStrategy,
)
from cropi.rollouts.shards import read_trajectories
from cropi.stages.trajectories import Layer, newest_rollouts, read_overlay


def rows(prompt_id: str, mark: float, generations: int = 2) -> list[dict[str, Any]]:
    """A group whose log-probs say where it comes from."""
    return [
        {
            "prompt_id": prompt_id,
            "set": "train",
            "sample": sample,
            "prompt_ids": [1],
            "completion_ids": [2, 3],
            "behaviour_logprobs": [mark, float(sample)],
            "completion": "x",
            "reward": float(sample),
            "verdict": "correct",
            "status": "ok",
        }
        for sample in range(generations)
    ]


def layer(folder: Path, stage: int, trained: bool, marks: dict[str, float]) -> Layer:
    for prompt_id, mark in marks.items():
        write_table(folder / f"part-{prompt_id}.parquet", rows(prompt_id, mark, 3), TRAJECTORIES)
    folder.mkdir(exist_ok=True, parents=True)
    return Layer(folder, finish(folder, "x", inputs={}, counts={}).identity, stage, trained)


def marks(table: pa.Table) -> dict[str, set[float]]:
    found: dict[str, set[float]] = {}
    for row in table.to_pylist():
        found.setdefault(row["prompt_id"], set()).add(row["behaviour_logprobs"][0])
    return found


BASE = pa.Table.from_pylist([row for i in "abcde" for row in rows(i, 0.0)], schema=TRAJECTORIES)


def test_the_newest_group_of_every_prompt_wins(tmp_path: Path) -> None:
    layers = [
        layer(tmp_path / "rollouts 1", 1, True, {"a": 10.0, "b": 10.0, "c": 10.0}),
        layer(tmp_path / "fresh 1", 1, False, {"b": 11.0, "c": 11.0}),
        layer(tmp_path / "rollouts 2", 2, True, {"c": 20.0}),
        layer(tmp_path / "fresh 2", 2, False, {"d": 21.0}),
    ]
    overlay = read_overlay(layers)
    newest = overlay.over(BASE)
    assert marks(newest) == {"a": {10.0}, "b": {11.0}, "c": {20.0}, "d": {21.0}, "e": {0.0}}
    assert newest.num_rows == 4 * 3 + 2  # no group of two policies
    assert newest.schema == TRAJECTORIES
    assert newest.column("prompt_ids").num_chunks == 1
    assert overlay.drawn(list("abcde")).tolist() == [0, 1, 1, 2, -1]
    assert overlay.drawn_at(5) == {"a": 0, "b": 5, "c": 5, "d": 10}
    assert overlay.reused(list("abcde"), 2).tolist() == [False, False, True, False, False]
    assert read_overlay(layers[:2]).identity != read_overlay(layers[:3]).identity != overlay.identity


def test_without_layers_the_base_trajectories_are_handed_on_as_they_are() -> None:
    overlay = read_overlay([])
    assert overlay.over(BASE) is BASE
    assert overlay.identity is None


def test_a_layer_may_be_empty(tmp_path: Path) -> None:
    overlay = read_overlay([layer(tmp_path / "rollouts", 1, True, {})])
    assert overlay.over(BASE) is BASE
    assert overlay.identity is not None


def test_rollouts_of_a_stage_give_the_newest_group_of_each_prompt(tmp_path: Path) -> None:
    batches = {(3, 0): "ab", (4, 0): "ac", (4, 1): "ad", (10, 0): "b", (7, 0): "e", (8, 0): "a"}
    for (step, batch), prompts in batches.items():
        keep_rollouts((tmp_path / "raw", step, batch, 0), [row for i in prompts for row in rows(i, step + batch / 4)])
    (tmp_path / "out").mkdir()
    counts, details = newest_rollouts(tmp_path / "raw", 4, 8, tmp_path / "out")
    assert marks(read_trajectories(tmp_path / "out")["train"]) == {
        "a": {4.25},
        "c": {4.0},
        "d": {4.25},
        "e": {7.0},
    }
    assert counts == {"ok": 8}
    assert details == {"prompts": 4}


def test_strategies_that_follow_newer_trajectories() -> None:
    assert InfluenceStrategy(type="influence").follows_trajectories
    assert LearnabilityStrategy(type="learnability").follows_trajectories
    assert PassRateStrategy(type="pass_rate").follows_trajectories
    assert not InfluenceStrategy(type="influence", static=True).follows_trajectories
    assert not FullStrategy(type="full").follows_trajectories
    assert not RandomStrategy(type="random").follows_trajectories
