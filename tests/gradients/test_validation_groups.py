"""Scores by gain, by candidates of the pool, and with lengths, as strategies other than plain influence need them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import tiny_llama
from tests.stages.test_score import MIXED, SOLVED, UNREADABLE, VALIDATION, config, group, run, table

from cropi.curriculum.strategies.learnalign import LearnAlignStrategy
from cropi.curriculum.strategy import CANDIDATES
from cropi.errors import SignalError
from cropi.functional.influence_formulas import halves
from cropi.gradients.group_influence import influence
from cropi.gradients.groups import Group, surrogate_settings
from cropi.gradients.influence_scorer import ScorerOptions
from cropi.gradients.reference import prompt_gradient
from cropi.gradients.validation_directions import candidate_groups
from cropi.seeds import unit_interval

TABLES = {"train": table([*MIXED, SOLVED, UNREADABLE], "train"), "validation/sum": table(VALIDATION, "validation/sum")}
UNEVEN = [group(f"u{n}", [1.0] * (1 + n) + [0.0] * (3 - n)) for n in range(3)]  # pass rates 1/4, 1/2, 3/4


def scored(folder: Path, strategy: str, *overrides: str) -> tuple[list[dict[str, Any]], Any]:
    return run(folder, f"select.strategy={{type: {strategy}}}", *overrides, tables=TABLES)


def vector(groups: list[Group]) -> dict[str, np.ndarray]:
    settings = surrogate_settings(config(), "dr_grpo", "none")
    found = {}
    for one in groups:
        gradients = prompt_gradient(tiny_llama(tied=True), one, settings, batch_tokens=4096).gradients
        found[one.prompt_id] = np.concatenate([gradients[name].double().numpy().ravel() for name in sorted(gradients)])
    return found


@pytest.mark.parametrize("estimator", ["exact", "sketch", "reference"])
def test_candidates_take_the_place_of_validation_sets(tmp_path, estimator, monkeypatch):
    monkeypatch.setattr(LearnAlignStrategy, "candidates_aimed_at", 4)
    rows, details = scored(tmp_path, "learnalign", f"score.estimator={estimator}", "score.score=cosine")
    gradients = vector(MIXED)
    sampled = halves({i: unit_interval(0, "candidates", i) for i in gradients}, 4)
    assert details["validation_groups"] == dict.fromkeys(CANDIDATES, 2)
    assert details["score"] == "dot"
    bound = 0.1 if estimator == "sketch" else 1e-5
    for row in rows[: len(MIXED)]:
        own = gradients[row["prompt_id"]]
        length = np.linalg.norm(own)
        assert row["feature_norm"] == pytest.approx(length, rel=bound)
        for name, half in zip(CANDIDATES, sampled, strict=True):
            mean = np.mean([gradients[i] / np.linalg.norm(gradients[i]) for i in half], axis=0)
            assert row[f"influence/{name}"] == pytest.approx(own @ mean, rel=bound, abs=bound * length)


def test_two_candidates_at_least() -> None:
    with pytest.raises(SignalError, match="at least two are needed"):
        candidate_groups(table([MIXED[0]], "train"), 10, 0)
    assert [len(part) for part in candidate_groups(table(MIXED, "train"), 100, 0).values()] == [5, 4]


def test_lengths_are_known_where_the_score_needs_none(tmp_path: Path) -> None:
    lengths = {i: np.linalg.norm(own) for i, own in vector(MIXED).items()}
    rows, _ = scored(tmp_path / "a", "gradient_norm", "score.estimator=exact")
    assert [row["feature_norm"] for row in rows[:9]] == pytest.approx([lengths[row["prompt_id"]] for row in rows[:9]])
    rows, _ = scored(tmp_path / "b", "influence", "score.estimator=exact")
    assert [row["feature_norm"] for row in rows[:9]] == [None] * 9


@pytest.mark.parametrize("estimator", ["exact", "sketch", "reference"])
def test_gain_is_cosine_times_the_deviation_of_a_verdict(estimator: str) -> None:
    found = {
        kind: influence(
            tiny_llama(tied=True), UNEVEN, {"v": VALIDATION}, options=ScorerOptions(estimator, kind)
        ).values[:, 0]
        for kind in ("cosine", "gain")
    }
    assert np.abs(found["cosine"]).min() > 1e-4
    np.testing.assert_allclose(found["gain"] / found["cosine"], np.sqrt([3 / 16, 1 / 4, 3 / 16]))


def test_errors_of_gain_are_scaled_as_its_values() -> None:
    groups = [group(f"j{n}", [1.0] * right + [0.0] * (5 - right)) for n, right in enumerate((2, 3))]
    found = [
        influence(
            tiny_llama(tied=True), groups, {"v": VALIDATION}, options=ScorerOptions(score=score), standard_errors=True
        )
        for score in ("dot", "gain")
    ]
    relative = [one.standard_errors / one.values for one in found if one.standard_errors is not None]
    np.testing.assert_allclose(relative[1], relative[0], rtol=1e-6)
    assert (np.abs(relative[0]) > 0).all()
