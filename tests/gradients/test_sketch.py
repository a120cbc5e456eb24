"""Features read off the factors against the projection of whole gradients, and against the map written out; over seeds,
inner products have the expectation and the variance that `SparseProjection` states."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from tests.gradients.architectures import (
    GROUPS,
    SETTINGS,
    Gradients,
    relative_gap,
    segments,
    tiny,
    tiny_lora,
    without_casts,
)
from torch import Tensor, nn

from cropi.functional.projection import SparseProjection, principal_directions
from cropi.gradients.engine import Engine
from cropi.gradients.reference import prompt_gradient
from cropi.gradients.sketch import GradientMap, SketchReader, StructuredMap, UniformMap, project

PROJECTIONS = {
    "uniform": SparseProjection(dim=37, keep_fraction=0.3, seed=1, mask="uniform"),
    "uniform wide": SparseProjection(dim=1 << 15, keep_fraction=0.3, seed=2, mask="uniform"),
    "uniform whole": SparseProjection(dim=512, keep_fraction=1.0, seed=3, mask="uniform"),
    "rank 0": SparseProjection(dim=37, keep_fraction=0.3, seed=4, rank=0),
    "rank 3": SparseProjection(dim=1 << 15, keep_fraction=0.3, seed=5, rank=3),
    "rank 8": SparseProjection(dim=512, keep_fraction=0.1, seed=6, rank=8),
}


def random_gradients(shapes: dict[str, tuple[int, ...]], seed: int) -> Gradients:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}


def random_directions(shapes: dict[str, tuple[int, ...]], matrices: set[str], rank: int) -> Gradients:
    gradients = random_gradients(shapes, 77)
    return {name: principal_directions(gradients[name], gradients[name].mean(dim=0), rank) for name in sorted(matrices)}


def make_map(projection: SparseProjection, shapes: dict[str, tuple[int, ...]], directions: Gradients) -> GradientMap:
    """The map for parameters of the given shapes."""
    parameters = {name: nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for name, shape in shapes.items()}
    if projection.mask == "uniform":
        return UniformMap(projection, parameters)
    return StructuredMap(projection, parameters, directions)


def written_out(projection: SparseProjection, gradients: Gradients, directions: Gradients) -> Tensor:
    """The feature from the definition: which numbers are kept, how they are scaled, and where each one goes."""
    feature_D = torch.zeros(projection.dim, dtype=torch.float64)

    def add(name: str, counters: Tensor, values: Tensor) -> None:
        found = projection.signed_buckets(name, counters.reshape(-1))
        signs = 1.0 - 2.0 * (found >= projection.dim)
        feature_D.index_add_(0, found % projection.dim, signs * values.reshape(-1))

    for name, gradient in gradients.items():
        places = torch.arange(gradient.numel()).reshape(gradient.shape)
        if projection.mask == "uniform":
            kept = projection.mask_of(name, places.reshape(-1)).reshape(gradient.shape)
            add(name, places, gradient * kept / projection.keep_fraction**0.5)
        elif name not in directions:
            add(name, places, gradient)
        else:
            along = gradient @ directions[name]
            add(f"{name}/directions", torch.arange(along.numel()), along)
            rest = gradient - along @ directions[name].T
            columns = projection.subset(name, "columns", gradient.shape[1], projection.keep_fraction)
            kept = rest[:, columns]
            add(name, places[:, columns], kept * (rest.numel() / kept.numel()) ** 0.5)
    return feature_D


@pytest.fixture(params=["llama", "llama_tied", "gpt_neox", "llama_lora"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    model = tiny_lora() if request.param == "llama_lora" else tiny(request.param)
    with without_casts(model, monkeypatch):
        return model


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_features_are_projections_of_whole_gradients(model: Any, kind: str) -> None:
    projection = PROJECTIONS[kind]
    engine = Engine(model, SETTINGS, 30)
    shapes = {name: tuple(parameter.shape) for name, parameter in engine.parameters.items()}
    directions = random_directions(shapes, engine.matrices, projection.rank)
    gradient_map = make_map(projection, shapes, directions)
    reader = SketchReader(gradient_map, len(GROUPS), torch.float64)
    engine.run(segments(), reader)
    for row, group in enumerate(GROUPS):
        gradients = prompt_gradient(model, group, SETTINGS, batch_tokens=1).gradients
        expected = written_out(projection, gradients, directions)
        assert relative_gap(project(gradient_map, gradients), expected) < 1e-9
        assert relative_gap(reader.features_ND[row], expected) < 1e-9


def test_the_engine_tells_matrices_and_vocabulary() -> None:
    for name, head in (("llama", "lm_head.weight"), ("llama_tied", "model.embed_tokens.weight")):
        engine = Engine(tiny(name), SETTINGS, 1000)
        linear = {n for n in engine.parameters if n.endswith("_proj.weight")}
        assert engine.vocabulary == {head}
        assert engine.matrices == linear | {head}


SHAPES = {
    "square": {"w": (12, 12)},
    "wide": {"w": (6, 20)},
    "vocabulary": {"head": (30, 8)},
    "embedding": {"embed": (15, 8), "norm": (1,)},
    "vector": {"norm": (20,)},
    "together": {"w": (6, 10), "head": (15, 6), "embed": (15, 6), "norm": (10,)},
}
MATRICES = {"w", "head"}
MASKS = {
    "uniform": SparseProjection(dim=64, keep_fraction=0.3, mask="uniform"),
    "rank 0": SparseProjection(dim=64, keep_fraction=0.3, rank=0),
    "rank 3": SparseProjection(dim=64, keep_fraction=0.3, rank=3),
}


def pair(shapes: dict[str, tuple[int, ...]]) -> tuple[Gradients, Gradients]:
    """Two gradients whose inner product is not near 0."""
    u, noise = random_gradients(shapes, 1), random_gradients(shapes, 2)
    return u, {name: noise[name] + 0.5 * u[name] for name in u}


def inner(u: Gradients, v: Gradients) -> float:
    return sum(float((u[name] * v[name]).sum()) for name in u)


def products_over_seeds(
    projection: SparseProjection, shapes: dict[str, tuple[int, ...]], seeds: int
) -> tuple[Tensor, Gradients]:
    u, v = pair(shapes)
    directions = random_directions(shapes, MATRICES & set(shapes), projection.rank)
    found = []
    for seed in range(seeds):
        gradient_map = make_map(dataclasses.replace(projection, seed=seed), shapes, directions)
        found.append(float(project(gradient_map, u) @ project(gradient_map, v)))
    return torch.tensor(found, dtype=torch.float64), directions


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", ["wide", "embedding", "together"])
def test_inner_products_are_unbiased(shape: str, mask: str) -> None:
    """A scale left out for one kind of parameter is an error of many standard errors."""
    values, _ = products_over_seeds(MASKS[mask], SHAPES[shape], 300)
    true = inner(*pair(SHAPES[shape]))
    standard_error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - true) < 4 * standard_error
    assert standard_error < 0.25 * abs(true)


def flat(gradients: Gradients) -> Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients.values()])


def sketch_variance(u: Tensor, v: Tensor, dim: int) -> float:
    """Of a count-sketch's inner product, for vectors that are not random themselves."""
    return float((u @ u) * (v @ v) + (u @ v) ** 2 - 2 * (u * u * v * v).sum()) / dim


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("shape", ["square", "embedding"])
def test_variance_of_the_uniform_mask(shape: str) -> None:
    dim, q = 32, 0.3
    values, _ = products_over_seeds(SparseProjection(dim, q, mask="uniform"), SHAPES[shape], 600)
    u, v = (flat(gradients) for gradients in pair(SHAPES[shape]))
    squares = float((u * u * v * v).sum())
    # of the kept and scaled vectors the sketch's term is the same on average: in it, no coordinate meets itself
    expected = (1 / q - 1) * squares + sketch_variance(u, v, dim)
    assert float(values.var()) == pytest.approx(expected, rel=0.25)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("shape", ["wide", "vocabulary"])
def test_variance_of_kept_columns(shape: str, rank: int) -> None:
    """I^2 / k (1 - k / I) S^2 on what the directions leave; among so many buckets the sketch adds next to nothing."""
    projection = SparseProjection(1 << 13, 0.3, rank=rank)
    values, directions = products_over_seeds(projection, SHAPES[shape], 500)
    ((name, u),), ((_, v),) = (g.items() for g in pair(SHAPES[shape]))
    u, v = (g - g @ directions[name] @ directions[name].T for g in (u, v))
    columns_I = (u * v).sum(dim=0)
    size = len(columns_I)
    kept = round(0.3 * size)
    expected = size**2 / kept * (1 - kept / size) * float(columns_I.var())
    assert float(values.var()) == pytest.approx(expected, rel=0.25)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("shape", ["square", "vector"])
def test_variance_of_the_sketch(shape: str) -> None:
    """Where all is kept: <u, u> <v, v> + <u, v>^2 - 2 sum u^2 v^2 over the dimensions, directions and rest apart."""
    dim = 24
    values, directions = products_over_seeds(SparseProjection(dim, 1.0, rank=2), SHAPES[shape], 600)
    vectors = []
    for gradients in pair(SHAPES[shape]):
        for name, directions_IR in directions.items():
            gradients[f"{name}/directions"] = along = gradients[name] @ directions_IR
            gradients[name] = gradients[name] - along @ directions_IR.T
        vectors.append(flat(gradients))
    assert float(values.var()) == pytest.approx(sketch_variance(*vectors, dim), rel=0.25)


def test_nothing_but_the_sketch_is_left_to_chance_within_the_directions() -> None:
    """A gradient whose inputs lie in the span of U is kept whole, however little of the rest is."""
    shapes = {"w": (6, 20)}
    directions = random_directions(shapes, {"w"}, 4)
    gradient_map = make_map(SparseProjection(1 << 17, 0.05, seed=3, rank=4), shapes, directions)
    generator = torch.Generator().manual_seed(5)
    u, v = (torch.randn(6, 4, dtype=torch.float64, generator=generator) @ directions["w"].T for _ in range(2))
    found = float(project(gradient_map, {"w": u}) @ project(gradient_map, {"w": v}))
    assert found == pytest.approx(float((u * v).sum()), rel=1e-9)
