"""Directions do not depend on how many parameters they are made of at a time."""

import numpy as np
import pytest
import torch
from tests.gradients.architectures import BUILDERS, SETTINGS, draw_group

from cropi.functional.projection import SparseProjection
from cropi.gradients import validation_directions as directions
from cropi.gradients.influence_scorer import Scorer, ScorerOptions

VALIDATION = {
    "one": [draw_group(5, [7, 4, 6], seed=50 + n) for n in range(3)],
    "two": [draw_group(4, [3, 8], seed=60 + n) for n in range(2)],
}

ROOMS = (1 << 40, 300 * (4 * len(VALIDATION) + 20))
"""Bytes: for all parameters at once, and for a few."""


@pytest.mark.parametrize("mask", ["structured", "uniform"])
@pytest.mark.parametrize("mean", ["plain", "normalized"])
@pytest.mark.parametrize("name", ["qwen2", "llama", "llama_lora"])
def test_parts_of_the_parameters_make_the_same_directions(name, mean, mask, monkeypatch):
    projection = SparseProjection(dim=128, keep_fraction=0.2, mask=mask)  # type: ignore[arg-type]
    found = []
    for room in ROOMS:
        monkeypatch.setattr(directions, "free_bytes", lambda _, room=room: room / directions.MEMORY_SHARE["cpu"])
        scorer = Scorer(
            BUILDERS[name](), SETTINGS, ScorerOptions(score="cosine", validation_mean=mean, projection=projection)
        )  # type: ignore[arg-type]
        met: list[int] = []
        scorer.aim(VALIDATION, met.append)
        assert sum(met) == 5  # however often they pass
        found.append(scorer)
    whole, parts = found
    assert whole.direction_passes == 1
    assert parts.direction_passes > 3
    torch.testing.assert_close(parts.features_VD, whole.features_VD)
    assert whole.layer_directions.keys() == parts.layer_directions.keys()
    for layer, columns_IR in whole.layer_directions.items():
        assert torch.equal(columns_IR, parts.layer_directions[layer])
    np.testing.assert_allclose(parts.direction_cosines(), whole.direction_cosines(), rtol=1e-12)
    for name, reliability in whole.direction_reliability.items():
        assert parts.direction_reliability[name] == pytest.approx(reliability, rel=1e-10)
    groups = [draw_group(6, [9, 1, 5], seed=70), draw_group(3, [4, 4], seed=71)]
    np.testing.assert_allclose(parts.values(parts(groups)), whole.values(whole(groups)), rtol=1e-6)


def test_exact_directions_are_made_in_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, found = [draw_group(6, [9, 1, 5], seed=70)], []
    for room in ROOMS:
        monkeypatch.setattr(directions, "free_bytes", lambda _, room=room: room / directions.MEMORY_SHARE["cpu"])
        scorer = Scorer(BUILDERS["llama_tied"](), SETTINGS, ScorerOptions(estimator="exact", score="cosine"))
        scorer.aim(VALIDATION)
        found.append((scorer.direction_passes, scorer.values(scorer(groups))))
    (one, whole), (several, parts) = found
    assert one == 1 < several
    np.testing.assert_allclose(parts, whole, rtol=1e-12)
