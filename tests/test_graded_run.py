"""A run whose verifier gives grades: they, and not the verdicts, are what is learned from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

import cropi as library
from cropi.artifacts import OK, read_table
from cropi.builtin import POLICY_DIR
from cropi.config.loading import load_config
from cropi.gradients.groups import Group, iterate_groups
from cropi.rollouts.shards import read_trajectories
from cropi.run_tables import scores_schema
from cropi.streams import read_jsonl
from tests.rewards.functions import near
from tests.runs import SMALL, cropi_error, cropi_ok

THRESHOLD = 0.4
GRADED = [
    *SMALL,
    f"verifier={{type: function, path: tests.rewards.functions.near, graded: true, threshold: {THRESHOLD}}}",
    "score={estimator: exact, normalizer: sequence, advantage_std: true}",
    "select.strategy={type: influence}",
    "run_dir=runs",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graded")
    cropi_ok("run", "quickstart", *GRADED, cwd=folder)
    return folder / "runs" / "quickstart"


def groups(run: Path, name: str) -> dict[str, Group]:
    return {i: group for i, group in iterate_groups(read_trajectories(run / "trajectories")[name]) if group}


def test_trajectories_hold_the_function_s_values(run: Path) -> None:
    answers = {
        row["prompt_id"]: row["answer"] for row in pq.read_table(run / "prompts" / "prompts.parquet").to_pylist()
    }
    rows = read_trajectories(run / "trajectories")["train"].to_pylist()
    assert [row["reward"] for row in rows] == near(
        [row["completion"] for row in rows], [answers[row["prompt_id"]] for row in rows]
    )
    assert any(0 < row["reward"] < 1 for row in rows)
    assert {row["verdict"] == "correct" for row in rows if row["reward"] >= THRESHOLD} == {True}
    assert {row["verdict"] == "wrong" for row in rows if row["reward"] < THRESHOLD} == {True}


def test_scores_are_the_gradients_of_the_mean_grade(run: Path) -> None:
    """By autograd, through the library's reference; and not those of the verdicts."""
    scores = read_table(run / "scores/stage-000/scores.parquet", scores_schema(["sum"])).to_pylist()
    stored, validation = groups(run, "train"), list(groups(run, "validation/sum").values())
    chosen = [row for row in scores if row["status"] == OK][:6]
    policy = AutoModelForCausalLM.from_pretrained(POLICY_DIR)
    parts = [stored[row["prompt_id"]] for row in chosen]
    reference = library.ScorerOptions(estimator="reference")
    found = library.influence(policy, parts, {"sum": validation}, options=reference)
    np.testing.assert_allclose([row["influence/sum"] for row in chosen], found.values[:, 0], rtol=2e-3, atol=1e-6)
    assert [row["pass_rate"] for row in chosen] == pytest.approx([np.mean(group.rewards) for group in parts])


def test_training_is_rewarded_by_grades_and_evaluation_counts_what_is_right(run: Path) -> None:
    rewards = [value for row in read_jsonl(run / "rewards.jsonl") for value in row["rewards"]]
    assert any(0 < value < 1 for value in rewards)
    right = {row["greedy"] for path in run.glob("**/step-*.parquet") for row in pq.read_table(path).to_pylist()}
    assert right == {0, 1}


def test_learnability_is_the_variance_of_the_grades(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "trajectories", tmp_path / "runs/quickstart/trajectories")
    shutil.copytree(run / "prompts", tmp_path / "runs/quickstart/prompts")
    strategy = "select.strategy={type: learnability}"
    config = load_config("quickstart", [*GRADED, strategy, f"run_dir={tmp_path / 'runs'}"])
    (tmp_path / "runs/quickstart/config.json").write_text(json.dumps(config.resolved()))
    cropi_ok("select", "quickstart", *GRADED, strategy, cwd=tmp_path)
    rows = pq.read_table(tmp_path / "runs/quickstart/selections/stage-000/selection.parquet").to_pylist()
    stored = groups(run, "train")
    for row in rows:
        assert row["score"] == pytest.approx(np.var(stored[row["prompt_id"]].rewards), abs=1e-12)


def test_check_goes_by_rewards_where_nothing_is_right(tmp_path: Path) -> None:
    strict = "verifier={type: function, path: tests.rewards.functions.grudging, graded: true, threshold: 0.9}"
    done = cropi_ok("check", "quickstart", *GRADED, strict, "--json", cwd=tmp_path)
    result = json.loads(done.stdout)
    assert "correct" not in result["verdicts"]
    assert result["mixed_groups"] > 0
    assert not any("rewarded" in text for text in result["warnings"])


def test_grades_above_1_end_the_run_before_anything_is_learned_from_them(tmp_path: Path) -> None:
    """Though the recorded answers earn 1."""
    above = "verifier={type: function, path: tests.rewards.functions.generous, graded: true}"
    for command in ("check", "run"):
        done = cropi_error(command, "quickstart", *GRADED, above, cwd=tmp_path)
        assert "error: verifier: the score 1.2 is outside 0 to 1" in done.stderr
        assert "Fix: scale its value" in done.stderr
    assert not list(tmp_path.glob("runs/**/part-train-*.parquet"))


@pytest.mark.parametrize(
    ("name", "threshold", "said"),
    [
        ("grudging", 0.5, "rewards lie between 0"),
        ("generous", 0, "the score 1.2"),  # a threshold that graded rewards may not have
    ],
)
def test_check_names_rewards_that_training_would_not_get(tmp_path, name, threshold, said):
    """Of a function without `graded: true` only the threshold counts."""
    function = f"verifier={{type: function, path: tests.rewards.functions.{name}, threshold: {threshold}}}"
    done = cropi_ok("check", "quickstart", *GRADED, function, "--json", cwd=tmp_path)
    rule = f"training gets 1 from {threshold} on, else 0"
    (told,) = [text for text in json.loads(done.stdout)["warnings"] if rule in text]
    assert told.startswith(said)


def test_a_verifier_that_fails_often_is_named(tmp_path: Path) -> None:
    flaky = "verifier={type: function, path: tests.rewards.functions.at_times_raises, graded: true}"
    done = cropi_ok("collect", "quickstart", *GRADED, flaky, cwd=tmp_path)
    assert "warning: the verifier failed on a completion, which earns nothing: RuntimeError: no" in done.stderr
    assert re.search(r"warning: the verifier failed on \d+ of 432 completions", done.stderr)
    done = cropi_error(
        "check", "quickstart", *GRADED, flaky.replace("at_times_raises", "bare"), "name=other", cwd=tmp_path
    )
    assert "the verifier fails on the recorded answers themselves: TypeError" in done.stderr
