"""Models that the engine does not cover are scored by autograd, which one warning says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.gradients.architectures import GROUPS, SETTINGS, influence_by_autograd, tiny, with_lora
from tests.gradients.test_every_causal_lm import VALIDATION, build
from tests.gradients.test_model_checks import NOT_CAUSAL

import cropi
from cropi.console import warn_once
from cropi.errors import PolicyError, UncoveredError
from cropi.gradients import influence_scorer
from cropi.gradients.influence_scorer import ScorerOptions, scorer_of

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

UNCOVERED: dict[str, Callable[[], Any]] = {
    "Conv1D": lambda: build("gpt2").double(),
    "experts": lambda: build("mixtral"),
    "a state": lambda: build("falcon_h1"),
    "short convolutions": lambda: build("lfm2"),
    "sinks": lambda: build("gpt_oss"),
    "adapters on experts": lambda: with_lora(
        build("qwen3_moe"), ["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_influence_is_that_of_autograd_and_said_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    warn_once.cache_clear()
    model = UNCOVERED[name]()
    dots, lengths = influence_by_autograd(model, GROUPS, VALIDATION)
    for score, expected in (("dot", dots), ("cosine", dots / lengths)):
        options = ScorerOptions(score=score)
        found = cropi.influence(model, GROUPS, {"v": VALIDATION}, surrogate=SETTINGS, options=options)
        np.testing.assert_allclose(found.values[:, 0], expected, atol=1e-4 * float(expected.abs().max()))
    said = capsys.readouterr().err
    assert said.count("warning: ") == said.count("come from autograd instead") == 1


def test_a_model_that_the_engine_covers_keeps_its_estimator(capsys: pytest.CaptureFixture[str]) -> None:
    assert scorer_of(tiny("llama"), SETTINGS, ScorerOptions("exact")).estimator == "exact"
    assert capsys.readouterr().err == ""


def test_divided_weights_leave_no_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(influence_scorer, "is_sharded", lambda model: True)
    with pytest.raises(UncoveredError, match="Conv1D"):
        scorer_of(build("gpt2"), SETTINGS, ScorerOptions())


def test_what_autograd_cannot_score_either_is_refused_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PolicyError, match="depend on later tokens"):
        scorer_of(NOT_CAUSAL["a causal model whose attention is not"](), SETTINGS, ScorerOptions())
    assert capsys.readouterr().err == ""
