"""A small run of the strategy that pools: what it samples, what it sees, and that it goes on where it stopped."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cropi.errors import ConfigError
from cropi.functional.pooling import principal_points
from cropi.loading import load_config
from cropi.pipeline import score_stage, train_all
from cropi.rollouts.representations import read_representations
from cropi.rollouts.shards import sampled_prompts
from cropi.stages.collect import collect
from cropi.stages.run import Run
from cropi.stages.select import gather_candidates
from tests.runs import SMALL, evaluations, selections

STEPS = 2
POOLED = [
    *SMALL,
    "select.strategy={type: pooled, screen: 0.2}",
    "collect.fraction=0.5",
    "collect.num_generations=4",
    "train.stages=3",
    f"train.steps_per_stage={STEPS}",
    f"evaluate.every={STEPS}",
    "trainer.num_generations=4",
    "trainer.per_device_train_batch_size=16",
]


def run(folder: Path, *overrides: str) -> tuple[Run, Path]:
    torch.set_num_threads(1)
    pipeline = Run(load_config("quickstart", [*POOLED, *overrides, f"run_dir={folder}"]))
    collect(pipeline)
    train_all(pipeline)
    pipeline.folder.unlock()
    return pipeline, folder / "quickstart"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    return run(tmp_path_factory.mktemp("pooled"))


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def screened(folder: Path, stage: int) -> list[dict[str, Any]]:
    return [r for p in sorted((folder / f"screened/stage-{stage:03}").glob("part-*")) for r in rows(p)]


def test_half_of_the_pool_is_sampled_and_the_rest_can_be_selected(finished: tuple[Run, Path]) -> None:
    _, folder = finished
    sampled = {r["prompt_id"] for p in (folder / "trajectories").glob("part-train-*") for r in rows(p)}
    assert len(sampled) == 24
    scores = {r["prompt_id"]: r for r in rows(folder / "scores/stage-000/scores.parquet")}
    assert {i for i, r in scores.items() if r["status"] != "not_sampled"} == sampled
    selection = rows(folder / "selections/stage-000/selection.parquet")
    assert {r["prompt_id"] for r in selection if r["status"] == "not_sampled"} == set(scores) - sampled
    assert any(r["selected"] and r["prompt_id"] not in sampled for r in selection)


def test_it_scores_once_with_errors_and_the_validation_prompts_too(finished: tuple[Run, Path]) -> None:
    _, folder = finished
    assert [p.name for p in sorted(folder.glob("scores/stage-*"))] == ["stage-000"]
    found = rows(folder / "scores/stage-000/scores.parquet")
    assert all(r["standard_error/sum"] is not None for r in found if r["status"] == "ok")
    validation = rows(folder / "scores/stage-000/validation.parquet")
    assert 0 < len(validation) <= 6
    assert {r["set"] for r in validation} == {"sum"}
    assert all(r["trajectories"] == 8 for r in validation)
    places = read_representations(folder / "representations")
    assert len(places) == 48 + 6


def test_screening_samples_the_unknown_a_few_times_and_its_verdicts_count(finished: tuple[Run, Path]) -> None:
    pipeline, folder = finished
    seen = [screened(folder, stage) for stage in range(3)]
    assert any(seen)
    for stage, found in enumerate(seen):
        by_prompt: dict[str, list[float]] = {}
        for r in found:
            by_prompt.setdefault(r["prompt_id"], []).append(r["reward"])
        assert len(by_prompt) <= 10  # ceil(0.2 x 48)
        assert {len(rewards) for rewards in by_prompt.values()} <= {4}
        visits = [v for v in gather_candidates(pipeline, stage).visits if v.step == stage * STEPS]
        assert {v.prompt_id: v.mean_reward for v in visits} == {i: np.mean(r) for i, r in by_prompt.items()}
        assert all(r["behaviour_logprobs"] is None for r in found)
    charged = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    screening = [e for e in charged if e["stage"] is not None and e["phase"] == "collect"]
    assert {e["stage"] for e in screening} == {stage for stage, found in enumerate(seen) if found}
    assert {e["passes"] for e in screening} == {1}
    assert {e["passes"] for e in charged if e["stage"] is None and e["phase"] == "collect"} == {2}


def test_a_run_cut_off_before_a_selection_ends_the_same(finished: tuple[Run, Path], tmp_path: Path) -> None:
    _, folder = finished
    shutil.copytree(folder, tmp_path / "quickstart")
    ours = tmp_path / "quickstart"
    for name in ("scores/stage-002", "screened/stage-002", "selections/stage-002", "checkpoints/checkpoint-6"):
        shutil.rmtree(ours / name, ignore_errors=True)
    _, again = run(tmp_path)
    assert selections(again) == selections(folder)
    assert screened(again, 2) == screened(folder, 2)
    assert evaluations(again) == evaluations(folder)


def test_scoring_again_takes_fresh_validation_prompts_where_it_scores(tmp_path: Path) -> None:
    strategy = "select.strategy={type: pooled, rescore_every: 2, screen: 0}"
    pipeline, folder = run(tmp_path, strategy, "refresh={validation: true, reuse_rollouts: true}")
    assert [path.name for path in sorted((folder / "scores").iterdir())] == ["stage-000", "stage-002"]
    assert [path.name for path in (folder / "fresh-validation").iterdir()] == ["stage-002"]
    assert not (folder / "screened").exists()
    data = gather_candidates(pipeline, 2).pooling
    assert data is not None
    assert data.validation_tried_at == 2 * STEPS
    ids = list(pipeline.folder.train_prompts)
    trained = {v.prompt_id for v in gather_candidates(pipeline, 2).visits}
    assert trained
    assert all(data.tries_N[ids.index(i)] == 0 for i in trained)  # they are visits, and not counted twice


def test_prompts_near_the_validation_prompts_are_sampled_and_ratios_are_one(tmp_path: Path) -> None:
    pipeline, folder = run(tmp_path, "collect.fraction=0.25", "collect.nearby=0.25", "collect.logprobs=false")
    sampled = [r for p in (folder / "trajectories").glob("part-*") for r in rows(p)]
    assert all(r["behaviour_logprobs"] is None for r in sampled)
    train = {r["prompt_id"] for r in sampled if r["set"] == "train"}
    assert len(train) == 24
    uniform = sampled_prompts(
        load_config("quickstart", [*POOLED, "collect.fraction=0.25"]), pipeline.folder.prompt_rows
    )
    near = train - uniform
    assert len(near) == 12
    # by brute force over distances in the same coordinates
    places = read_representations(folder / "representations")
    points = dict(zip(places, principal_points(np.stack(list(places.values()))), strict=True))
    validation = [point for (name, _), point in points.items() if name != "train"]
    distance = {
        i: min(float(((point - other) ** 2).sum()) for other in validation)
        for (name, i), point in points.items()
        if name == "train" and i not in uniform
    }
    assert max(distance[i] for i in near) <= min(d for i, d in distance.items() if i not in near)

    scores = {r["prompt_id"]: r for r in rows(folder / "scores/stage-000/scores.parquet")}
    assert {r["ratio_ess"] for r in scores.values() if r["status"] == "ok"} == {1.0}
    charged = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    shared = [e for e in charged if e["stage"] is None and e["phase"] == "collect"]
    assert {e["passes"] for e in shared} == {1}
    assert [e["prompt_tokens"] > 0 for e in shared if e["tokens"] == 0] == [True]  # the representations, once
    assert not any("forward_tokens" in e for e in charged)
    with pytest.raises(ConfigError, match="no behaviour log-probs"):
        score_stage(pipeline, 0, pipeline.base.model, "pooled after step 2")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("select.strategy={type: influence}", "influence scores policies after the base policy"),
        ("select.strategy={type: pooled, rescore_every: 2}", "pooled scores policies after the base policy"),
        ("refresh={reuse_rollouts: true}", "set refresh off"),
    ],
)
def test_without_log_probs_later_policies_cannot_be_scored(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", [*POOLED, "collect.logprobs=false", override])


@pytest.mark.parametrize(
    "override",
    ["score.score=cosine", "score.validation_mean=normalized", "score.estimator=exact"],
)
def test_settings_that_leave_no_errors_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="pooled pools inner products by their standard errors"):
        load_config("quickstart", [*POOLED, override])
