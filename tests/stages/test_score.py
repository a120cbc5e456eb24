"""The `score` stage on hand-made trajectories: rows, statuses, and what an interruption costs."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from tests.conftest import tiny_llama
from tests.runs import SMALL, trajectory

from cropi.artifacts import TRAJECTORIES, read_table
from cropi.config import Config
from cropi.config.loading import load_config
from cropi.errors import SignalError
from cropi.functional.projection import KEPT
from cropi.gradients import score_shards
from cropi.gradients.group_influence import influence
from cropi.gradients.groups import Group, iterate_groups, surrogate_settings
from cropi.gradients.influence_scorer import Scorer, ScorerOptions
from cropi.gradients.reference import prompt_gradient
from cropi.run_tables import scores_schema
from cropi.stages import score as scoring
from cropi.stages.score import ScoredPool, score_pool

RNG = random.Random(5)
NAMES = ["sum"]


def group(prompt_id: str, rewards: list[float], logprob: float = -1.0) -> Group:
    completions = [[RNG.randrange(2, 13) for _ in range(RNG.randint(1, 6))] for _ in rewards]
    logprobs = [[logprob] * len(completion) for completion in completions]
    return Group(prompt_id, [RNG.randrange(2, 13) for _ in range(RNG.randint(1, 5))], completions, rewards, logprobs)


MIXED = [group(f"p{n}", [1.0, 0.0, 0.0, 1.0]) for n in range(9)]
SOLVED = group("solved", [1.0] * 4)
BROKEN = group("broken", [1.0, 0.0, 0.0, 1.0], logprob=float("nan"))
UNREADABLE = group("unreadable", [0.0] * 4)
VALIDATION = [group(f"v{n}", [1.0, 0.0, 1.0, 0.0]) for n in range(3)]
SOURCES = {g.prompt_id: "here" for g in [*MIXED, SOLVED, BROKEN, UNREADABLE]} | {"long": "here"}


def table(groups: list[Group], name: str) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for g in groups:
        status = "gold_unparseable" if g is UNREADABLE else "ok"
        for k, completion in enumerate(g.completions):
            ids = {"prompt_ids": g.prompt_ids, "completion_ids": completion, "reward": g.rewards[k]}
            logprobs = g.behaviour_logprobs[k]
            rows.append(trajectory(g.prompt_id, name, k, status=status, behaviour_logprobs=logprobs, **ids))
    RNG.shuffle(rows)
    return pa.Table.from_pylist(rows, schema=TRAJECTORIES)


TABLES = {
    "train": table([*MIXED, SOLVED, BROKEN, UNREADABLE], "train"),
    "validation/sum": table(VALIDATION, "validation/sum"),
}


def config(*overrides: str) -> Config:
    return load_config("quickstart", [*SMALL, *overrides])


def run(
    folder: Path, *overrides: str, tables: dict[str, pa.Table] = TABLES, model: Any = None
) -> tuple[list[dict[str, Any]], Any]:
    chosen = config(*overrides)
    settings = surrogate_settings(chosen, "dr_grpo", "none")
    pool = ScoredPool(tables, SOURCES)
    (folder / "scores").mkdir(parents=True, exist_ok=True)
    _, details = score_pool(chosen, settings, model or tiny_llama(tied=True), pool, folder / "scores")
    schema = scores_schema(chosen.select.strategy.directions(NAMES))
    return read_table(folder / "scores" / "scores.parquet", schema).to_pylist(), details


def values(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([row["influence/sum"] for row in rows])


@pytest.mark.parametrize("estimator", ["sketch", "exact", "reference"])
def test_rows_and_statuses(tmp_path: Path, estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KEPT, "structured", 1.0)
    rows, details = run(tmp_path, f"score.estimator={estimator}")
    assert [row["prompt_id"] for row in rows] == list(SOURCES)
    assert {row["prompt_id"]: row["status"] for row in rows if row["status"] != "ok"} == {
        "solved": "no_signal",
        "broken": "non_finite",
        "unreadable": "gold_unparseable",
        "long": "prompt_too_long",
    }
    assert all(row["influence/sum"] == 0 for row in rows if row["status"] != "ok")
    assert all(row["influence/sum"] != 0 and row["ratio_ess"] < 1 for row in rows if row["status"] == "ok")
    settings = surrogate_settings(config(), "dr_grpo", "none")
    direct = influence(
        tiny_llama(tied=True), MIXED, {"sum": VALIDATION}, surrogate=settings, options=ScorerOptions("exact")
    )
    bound = 0.2 if estimator == "sketch" else 1e-6
    np.testing.assert_allclose(values(rows[:9]), direct.values[:, 0], atol=bound * np.abs(direct.values).max())
    assert (details["projection"] is None) == (estimator != "sketch")


def test_a_policy_that_the_engine_does_not_cover_is_scored_all_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"vocab_size": 13, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": None, "eos_token_id": 1}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).double().eval()
    rows, details = run(tmp_path, "score.standard_errors=true", model=model)
    surrogate = surrogate_settings(config(), "dr_grpo", "none")
    gradients = [
        torch.cat([g.flatten() for g in prompt_gradient(model, group, surrogate).gradients.values()])
        for group in [*VALIDATION, *MIXED]
    ]
    aim = torch.stack(gradients[:3]).mean(0)
    np.testing.assert_allclose(values(rows[:9]), [float(gradient @ aim) for gradient in gradients[3:]], rtol=1e-6)
    assert all(row["standard_error/sum"] > 0 for row in rows[:9])
    assert (details["estimator"], details["projection"]) == ("reference", None)


def test_standard_errors_stand_beside_the_same_influence(tmp_path: Path) -> None:
    rows, details = run(tmp_path / "a", "score.standard_errors=true")
    plain, without = run(tmp_path / "b")
    bound = 1e-4 * np.abs(values(plain)).max()
    np.testing.assert_allclose(values(rows), values(plain), atol=bound)
    for row, other in zip(rows, plain, strict=True):
        assert (row["status"], row["kl"], row["clip_share"]) == pytest.approx(
            (other["status"], other["kl"], other["clip_share"])
        )
        assert other["standard_error/sum"] is None
        assert other["top_probability"] is None
        if row["status"] == "ok":
            assert row["standard_error/sum"] > 0
            assert 0 <= row["top_probability"] <= 1
        else:
            assert row["standard_error/sum"] is None
            assert row["top_probability"] == 0
    assert sum(row["top_probability"] for row in rows) == pytest.approx(4, abs=1)  # ceil(0.25 x 13) places
    assert 0 <= details["reliability"]["reliability"]["sum"] <= 1
    assert details["reliability"]["chance"] < details["reliability"]["expected_overlap"] <= 1
    assert without["reliability"] is None
    assert details["drift"]["kl"] == pytest.approx(without["drift"]["kl"])
    assert details["direction_reliability"]["sum"] == pytest.approx(without["direction_reliability"]["sum"])


def test_a_direction_of_noise_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two validation prompts whose gradients cancel: the same trajectories, the rewards turned round."""
    one = VALIDATION[0]
    other = Group("turned", one.prompt_ids, one.completions, [1 - r for r in one.rewards], one.behaviour_logprobs)
    half = Group("more", one.prompt_ids, one.completions, [1.0, 0.0, 0.0, 0.0], one.behaviour_logprobs)
    _, details = run(tmp_path, tables=TABLES | {"validation/sum": table([one, other, half], "validation/sum")})
    assert details["direction_reliability"]["sum"] < 0.2
    assert "its direction is mostly noise" in capsys.readouterr().err


def test_groups_come_in_order_and_in_full_however_few_rows_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cropi.gradients.groups._ROWS_AT_ONCE", 3)
    found = dict(iterate_groups(TABLES["train"]))
    assert list(found) == sorted(found)
    assert found["unreadable"] is None
    for expected in MIXED:
        again = found[expected.prompt_id]
        assert (again.completions, again.rewards) == (expected.completions, expected.rewards)


def test_nothing_finite_is_an_error(tmp_path: Path) -> None:
    tables = TABLES | {"train": table([BROKEN, SOLVED], "train")}
    with pytest.raises(SignalError, match="no prompt's influence is a finite number"):
        run(tmp_path, tables=tables)


def test_a_broken_validation_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SignalError, match="validation set sum is not a finite number"):
        run(tmp_path, tables=TABLES | {"validation/sum": table([*VALIDATION, BROKEN], "validation/sum")})


@pytest.mark.parametrize("errors", ["false", "true"])
def test_an_interrupted_scoring_goes_on_with_the_next_part(errors, tmp_path, monkeypatch):
    monkeypatch.setattr(score_shards, "SHARD_PROMPTS", 4)
    settings = f"score.standard_errors={errors}"
    whole, details = run(tmp_path / "a", settings)
    again, same = run_twice(tmp_path / "b", monkeypatch, settings)
    assert (again, same) == (whole, details)
    assert sorted(path.name for path in (tmp_path / "b" / "scores").iterdir()) == ["scores.parquet"]


def test_parts_of_another_policy_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_shards, "SHARD_PROMPTS", 4)
    whole, _ = run(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "weights_identity", lambda model: "another")
        again, _ = run_twice(tmp_path / "b", monkeypatch, after=patch.undo)
    assert again == whole


def run_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, after: Callable[[], None] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Interrupted in the second block of groups, and then to the end."""
    calls = 0

    def interrupted(self: Scorer, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    original = Scorer.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(folder, *overrides)
    if after is not None:
        after()
    return run(folder, *overrides)
