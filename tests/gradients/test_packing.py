"""A group's result does not depend on its company: alone or packed, prompts shared or not, any order, any budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.gradients.architectures import (
    GROUPS,
    SETTINGS,
    draw_group,
    random_gradients,
    relative_gap,
    segments,
    tiny,
    without_casts,
)
from torch import Tensor

from cropi.functional.projection import SparseProjection, principal_directions
from cropi.gradients.engine import Engine
from cropi.gradients.exact import DenseReader, ExactReader
from cropi.gradients.packing import Segment, plan
from cropi.gradients.reference import trainable_parameters
from cropi.gradients.sketch import SketchReader, StructuredMap, UniformMap

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

TRAIN = [*GROUPS, draw_group(6, [2, 2, 1, 4], seed=4), draw_group(3, [12, 11], seed=5)]
MODELS = {"gpt_neox": 1e-9, "llama_tied": 1e-9, "gemma3": 1e-6, "gemma2": 1e-6}
"""Tolerance by architecture; Llama is freed of its casts."""

Run = Callable[[Engine, Sequence[Segment], bool], Tensor]


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, float]:
    model = tiny(request.param)
    if request.param.startswith("llama"):
        with without_casts(model, monkeypatch):
            pass
    return model, MODELS[request.param]


def dense(engine: Engine, parts: Sequence[Segment], divisible: bool) -> Tensor:
    reader = DenseReader(engine.parameters, engine.vocabulary)
    engine.run(parts, reader, divisible=divisible)
    return torch.cat([gradient.reshape(-1) for gradient in reader.gradients.values()])[None]


def products(engine: Engine, parts: Sequence[Segment], divisible: bool) -> Tensor:
    reader = ExactReader([random_gradients(trainable_parameters(engine.model), seed) for seed in (1, 2)], len(TRAIN))
    engine.run(parts, reader, divisible=divisible)
    return reader.products_NV


def squares(engine: Engine, parts: Sequence[Segment], divisible: bool) -> Tensor:
    reader = ExactReader([random_gradients(trainable_parameters(engine.model), 1)], len(TRAIN), norms=True)
    engine.run(parts, reader, divisible=False)
    return reader.squares_N[:, None]


def uniform(engine: Engine, parts: Sequence[Segment], divisible: bool) -> Tensor:
    reader = SketchReader(UniformMap(SparseProjection(64, 0.3, 5), engine.parameters), len(TRAIN), torch.float64)
    engine.run(parts, reader, divisible=divisible)
    return reader.features_ND


def structured(engine: Engine, parts: Sequence[Segment], divisible: bool) -> Tensor:
    gradients = random_gradients(trainable_parameters(engine.model), 3)
    directions = {name: principal_directions(gradients[name], gradients[name][0], 3) for name in engine.matrices}
    projection = SparseProjection(64, 0.3, 5)
    gradient_map = StructuredMap(projection, engine.parameters, directions)
    reader = SketchReader(gradient_map, len(TRAIN), torch.float64)
    engine.run(parts, reader, divisible=divisible)
    return reader.features_ND


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest relative gap of a row."""
    return max(relative_gap(a, b) for a, b in zip(found, expected, strict=True) if bool(b.any()))


@pytest.mark.parametrize("run", [dense, products, squares, uniform, structured])
def test_any_company_order_and_budget_give_the_same(case: tuple[Any, float], run: Run) -> None:
    model, tolerance = case
    engine = Engine(model, SETTINGS, 10_000)
    parts = segments(TRAIN)
    together = run(engine, parts, True)
    assert bool((together != 0).any(dim=1).all())
    apart = sum(run(engine, [part], True) for part in parts)
    assert gap(apart, together) < tolerance
    assert gap(run(engine, parts[::-1], True), together) < tolerance
    for budget, divisible in ((1, True), (14, True), (14, False), (30, True)):
        engine = Engine(model, SETTINGS, budget)
        assert gap(run(engine, parts, divisible), together) < tolerance, (budget, divisible)


@pytest.mark.parametrize("run", [dense, products, uniform, structured])
def test_a_group_is_the_sum_of_its_trajectories(case: tuple[Any, float], run: Run) -> None:
    model, tolerance = case
    engine = Engine(model, SETTINGS, 10_000)
    parts = segments(TRAIN)
    together = run(engine, parts, True)
    single = [one for part in parts for one in part.alone()]
    assert len(single) == sum(len(group.completions) for group in TRAIN)
    assert gap(run(engine, single, True), together) < tolerance
    assert gap(sum(run(engine, [one], True) for one in single), together) < tolerance
    halves = [half for part in parts for half in part.halves()]
    assert gap(run(engine, halves, True), together) < tolerance
    turned = [dataclasses.replace(part, **_turned(part)) for part in parts]
    assert gap(run(engine, turned, True), together) < tolerance


def _turned(part: Segment) -> dict[str, Any]:
    logprobs = part.behaviour_logprobs
    return {
        "completions": part.completions[::-1],
        "scales": part.scales[::-1],
        "behaviour_logprobs": None if logprobs is None else logprobs[::-1],
    }


def test_plan_keeps_to_the_budget_and_to_the_number_of_segments() -> None:
    parts = segments(TRAIN)
    for budget in (1, 14, 25, 40, 1000):
        for most in (None, 1, 2):
            packs = plan(parts, budget, most)
            assert sorted(s.index for pack in packs for s in pack) == list(range(len(TRAIN)))
            assert all(len(pack) == 1 or sum(s.tokens for s in pack) <= budget for pack in packs)
            assert most is None or max(map(len, packs)) <= most
