import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.curriculum import pool

from cropi.config import Config, FusionConfig, Strategy
from cropi.config.loading import load_config
from cropi.curriculum.strategies import (
    FullStrategy,
    InfluenceStrategy,
    LearnabilityStrategy,
    PassRateStrategy,
    RandomStrategy,
)
from cropi.curriculum.strategy import Candidates
from cropi.errors import SignalError
from cropi.stages.select import choose_prompts

POOL = Candidates(
    prompt_ids=["a", "b", "c", "d", "e", "f"],
    sources=["x", "x", "x", "y", "y", "y"],
    statuses=["ok", "ok", "ok", "ok", "no_signal", "gold_unparseable"],
    pass_rates_N=np.array([0.125, 0.5, 0.75, 0.5, 1.0, np.nan]),
    variances_N=np.array([0.125, 0.5, 0.75, 0.5, 1.0, np.nan]) * np.array([0.875, 0.5, 0.25, 0.5, 0.0, np.nan]),
    training_variances={"b": 0.0, "a": 0.25 * 0.75},
    influence={"u": np.array([0.9, 0.1, -0.5, 0.3, 0.0, 0.0]), "v": np.array([-1.0, 0.4, 0.5, 0.3, 0.0, 0.0])},
    stage=0,
    seed=0,
)


def chosen(strategy: Strategy, size: int, candidates: Candidates = POOL, **options: FusionConfig) -> list[str]:
    return pool.chosen(strategy, size, candidates, **options)


def test_full_takes_everything_with_a_readable_answer() -> None:
    assert chosen(FullStrategy(type="full"), 6) == ["a", "b", "c", "d", "e"]


def test_learnability_by_hand() -> None:
    # p(1-p): a 7/64, b 1/4, c 3/16, d 1/4; ties by id; e and f have none
    assert chosen(LearnabilityStrategy(type="learnability"), 3) == ["b", "d", "c"]
    assert chosen(LearnabilityStrategy(type="learnability"), 6) == ["b", "d", "c", "a"]


def test_rescored_learnability_reads_training_rewards() -> None:
    # a is 3/16 now, b is solved
    assert chosen(LearnabilityStrategy(type="learnability", rescore=True), 4) == ["d", "a", "c"]


def test_pass_rate_band_keeps_its_ends() -> None:
    band = PassRateStrategy(type="pass_rate", low=0.125, high=0.5)
    assert sorted(chosen(band, 6)) == ["a", "b", "d"]


def test_influence_by_hand() -> None:
    # ranks u: a1 d2 b3 e4 f5 c6; v: c1 b2 d3 e4 f5 a6. With kappa 0: a 1+1/6, c 1/6+1, d 1/2+1/3, b 1/3+1/2
    strategy = InfluenceStrategy(type="influence")
    assert chosen(strategy, 3, fusion=FusionConfig(kappa=0)) == ["a", "c", "b"]
    # with kappa 60 the middle wins: b and d 1/62 + 1/63, a and c 1/61 + 1/66
    assert chosen(strategy, 2, fusion=FusionConfig(kappa=60)) == ["b", "d"]
    assert set(chosen(strategy, 6)) == {"a", "b", "c", "d"}  # without signal there is no influence


def test_truncated_fusion_counts_the_head_of_each_list() -> None:
    # three places: u counts a1 d2 b3, v counts c1 b2 d3
    ranking = InfluenceStrategy(type="influence").rank(POOL, 3, FusionConfig(kappa=0, truncate=True))
    np.testing.assert_allclose(ranking.scores_N, [1, 1 / 3 + 1 / 2, 1, 1 / 2 + 1 / 3, 0, 0])


def test_random_is_fixed_or_redrawn() -> None:
    later = dataclasses.replace(POOL, stage=1)
    fixed, redrawn = RandomStrategy(type="random"), RandomStrategy(type="random", redraw=True)
    assert chosen(fixed, 2) == chosen(fixed, 2, later)
    assert [chosen(redrawn, 2, dataclasses.replace(POOL, stage=s)) for s in range(8)] != [chosen(redrawn, 2)] * 8
    counts = dict.fromkeys("abcde", 0)
    for seed in range(400):
        for prompt_id in chosen(fixed, 1, dataclasses.replace(POOL, seed=seed)):
            counts[prompt_id] += 1
    assert all(abs(count - 80) < 4 * (400 * 0.2 * 0.8) ** 0.5 for count in counts.values())


def test_an_empty_selection_is_an_error() -> None:
    with pytest.raises(SignalError, match="none of the 6 prompts qualifies"):
        chosen(PassRateStrategy(type="pass_rate", low=0.9, high=0.95), 3)


def config() -> Config:
    return load_config("quickstart", ["select.strategy=influence", "select.fraction=0.5"])


def write(folder: Path, candidates: Candidates = POOL) -> tuple[bytes, bytes]:
    prompts = {i: {"messages": json.dumps(f"prompt {i}"), "answer": "1"} for i in candidates.prompt_ids}
    folder.mkdir(parents=True)
    choose_prompts(config(), candidates, prompts, folder)
    return (folder / "selection.parquet").read_bytes(), (folder / "selected.jsonl").read_bytes()


def test_files_are_byte_identical_and_say_why(tmp_path: Path) -> None:
    assert write(tmp_path / "one") == write(tmp_path / "two")
    lines = [json.loads(line) for line in (tmp_path / "one" / "selected.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["prompt b", "prompt d", "prompt a"]
    assert lines[0]["reason"] == "influence: #1 (u #3, v #2)"
    assert lines[0]["scores"] == {"u": 0.1, "v": 0.4}
    rows = pq.read_table(tmp_path / "one" / "selection.parquet").to_pylist()
    assert [row["prompt_id"] for row in rows] == ["b", "d", "a", "c", "e", "f"]
    assert rows[4]["rank"] is None
    assert not rows[4]["selected"]


def test_no_mixed_group_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SignalError, match="none of the 6 training prompts"):
        write(tmp_path / "one", dataclasses.replace(POOL, statuses=["no_signal"] * 6))
