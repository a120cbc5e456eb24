"""The influence scorer: compute validation directions of one policy, then the influence of groups on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cropi.artifacts import OK
from cropi.console import warn_once
from cropi.errors import PolicyError, UncoveredError
from cropi.fsdp import ShardedParameters, is_sharded
from cropi.functional import influence_formulas
from cropi.functional.projection import SparseProjection, principal_directions
from cropi.gradients.engine import Engine, by_group, segments_of
from cropi.gradients.exact import ExactReader, inner, norm, widened
from cropi.gradients.groups import Group, RatioStatistics, SurrogateSettings
from cropi.gradients.model_checks import require_independent_rows
from cropi.gradients.packing import Segment
from cropi.gradients.reference import prompt_gradient
from cropi.gradients.sketch import GradientMap, SketchReader, StructuredMap, UniformMap, project
from cropi.gradients.validation_directions import (
    REFERENCE_TOKENS,
    Directions,
    Gradients,
    Mean,
    MeanGradients,
    by_autograd,
    by_engine,
    room_for_directions,
)
from cropi.parallel import process_group

Estimator = Literal["exact", "sketch", "reference"]
Score = influence_formulas.Score

BLOCK = 256  # groups whose features are in memory at once; packs are filled from one block


@dataclass(frozen=True)
class ScorerOptions:
    """Options of a scorer."""

    estimator: Estimator = "sketch"
    """Inner product of a group's gradient with the directions. `exact`: without projection, at most (2 + V) forward
    passes of work, often 3. `sketch`: through a `SparseProjection`, about 2. `reference`: by autograd, one group at a
    time, at least 3."""
    score: Score = "dot"
    """Formula of the influence; see `cropi.functional.influence_formulas.influence`."""
    validation_mean: Mean = "plain"
    """Mean of the gradients of a validation set: `plain`, or of gradients scaled to length 1 (`normalized`)."""
    projection: SparseProjection = SparseProjection()  # noqa: RUF009 - frozen
    """Projection of `sketch`."""
    batch_tokens: int | None = None
    """Tokens of a forward pass; by default as many as memory allows."""
    lengths: bool = False
    """Compute the norms of gradients even if the score does not need them."""


@dataclass(frozen=True)
class Scored:
    """Scores of some groups, in their order; zeros for groups without signal."""

    products_NV: Float[np.ndarray, "N V"]  # <g_i, d_v>
    norms_N: Float[np.ndarray, " N"]
    """|g_i|; of the feature for `sketch`; NaN if not requested (`exact` with `dot`, without `lengths`)."""
    ratios: Sequence[RatioStatistics]  # of each group; those of no tokens if nothing was computed
    features_ND: Tensor | None  # gradient features, for `sketch` only
    tokens_computed: int
    errors_NV: Float[np.ndarray, "N V"] | None = None
    """Standard errors of the influence, if requested: 0 without signal. See `score_by_halves`."""
    variances_N: Float[np.ndarray, " N"] | None = None  # variances of the rewards


@dataclass(frozen=True)
class Aim:
    """Directions of a scorer, for another scorer of the same policy and settings."""

    directions: Sequence[Mapping[str, Tensor]]  # dense directions; none for `sketch`, which keeps their features only
    layer_directions: Mapping[str, Tensor]
    features_VD: Float[Tensor, "V D"] | None
    norms_V: Float[np.ndarray, " V"]


class Scorer:
    """Compute the influence of groups on validation sets: call `aim` with the validation sets, then score groups.

    The validation directions d_v are always exact and dense; estimators differ in the inner product of a training
    group's gradient with them. The ranks of a run make the directions together: each takes a share of the validation
    groups, and all get the same directions. Afterwards each scores its own groups.
    """

    def __init__(self, model: nn.Module, settings: SurrogateSettings, options: ScorerOptions = ScorerOptions()) -> None:
        estimator = options.estimator
        self.estimator, self.score, self._mean = estimator, options.score, options.validation_mean
        self._lengths = options.lengths or options.score != "dot"
        self.projection = options.projection
        self.layer_directions: dict[str, Tensor] = {}
        self.settings = settings
        self.model, self._batch_tokens = model, options.batch_tokens or REFERENCE_TOKENS
        if estimator == "reference" and ShardedParameters(model).sharded:
            raise PolicyError(
                "the reference estimator needs full parameters, and the policy's are sharded",
                where="score.estimator",
                fix="use sketch or exact.",
            )
        if estimator == "reference":
            require_independent_rows(model)
        self._engine = None if estimator == "reference" else Engine(model, settings, options.batch_tokens)
        self._ranks = process_group() if self._engine is None else self._engine.shards.ranks()

    def aim(self, validation: Mapping[str, Sequence[Group]], advance: Callable[[int], None] | None = None) -> None:
        """Compute the directions of validation sets. Raises SignalError if one is not finite.

        Also sets `direction_reliability`: by set, the expected correlation of this direction with one from as many
        other prompts; see `Directions.reliability_V`.
        """
        self._known = Directions(list(validation))
        if self._engine is None:
            gradients = by_autograd(self.model, self.settings, self._batch_tokens, validation, self._mean, advance)
            chunks = gradients.parameter_chunks(math.inf)
        else:
            gradients = by_engine(self._engine, validation, self._mean, advance)
            chunks = gradients.parameter_chunks(room_for_directions(self._engine))
        self.direction_passes = len(chunks)
        if self.estimator == "sketch":
            self._aim_sketch(gradients, chunks)
            self.norms_V = self.features_VD.double().norm(dim=1).numpy()
        else:
            self._aim_dense(gradients, chunks)
            self.norms_V = self._known.norms_V
        self.direction_reliability = dict(zip(validation, self._known.reliability_V.tolist(), strict=True))

    def _aim_dense(self, gradients: MeanGradients, chunks: Sequence[Sequence[str]]) -> None:
        self._directions: list[Gradients] = [{} for _ in self._known.norms_V]
        for names in chunks:
            for direction, found in zip(self._directions, self._known.add(gradients.of(names)), strict=True):
                direction |= found

    def _aim_sketch(self, gradients: MeanGradients, chunks: Sequence[Sequence[str]]) -> None:
        """Keep only the projected features of each direction, and U of a structured mask by parameter name."""
        self.layer_directions, features = {}, []
        for names in chunks:
            directions = self._known.add(gradients.of(names))
            if self.projection.mask == "structured":
                found = self._layer_directions(directions, gradients.mean_inputs)
                self._ranks.copy_main(found)
                self.layer_directions |= found
            self._map = self._make_map(names)
            features.append(torch.stack([project(self._map, direction) for direction in directions]).cpu())
            del directions
        if len(chunks) > 1:
            self._map = self._make_map()
        self.features_VD = torch.stack(features).sum(dim=0)
        self._ranks.copy_main({"features": self.features_VD})

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """Let processes with sharded parameters score any number of groups inside, each its own; see `Engine.lockstep`.
        A call outside opens a block of its own."""
        with nullcontext() if self._engine is None else self._engine.lockstep():
            yield

    @property
    def aimed(self) -> Aim:
        """Return the directions, for `aim_as`."""
        if self.estimator == "sketch":
            return Aim((), _on_cpu(self.layer_directions), self.features_VD, self.norms_V)
        return Aim([_on_cpu(direction) for direction in self._directions], {}, None, self.norms_V)

    def aim_as(self, aim: Aim) -> None:
        """Use the directions of another scorer; no gradient is computed."""
        places = {name: parameter.device for name, parameter in self.model.named_parameters()}
        self.norms_V = aim.norms_V
        self._directions = [{name: d.to(places[name]) for name, d in dense.items()} for dense in aim.directions]
        if aim.features_VD is not None:
            self.layer_directions = {name: U.to(places[name]) for name, U in aim.layer_directions.items()}
            self._map, self.features_VD = self._make_map(), aim.features_VD

    def __call__(
        self,
        groups: Sequence[Group],
        *,
        factors: Sequence[Sequence[float]] | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> Scored:
        """Score a block of groups. `factors` multiply the weights of each group's trajectories."""
        with self.lockstep():
            if self._engine is None:
                scored = self._by_reference(groups, factors, advance)
            else:
                segments = segments_of(groups, self.settings, factors)
                scored = self.score_segments(segments, len(groups), advance, norms=self._lengths)
        return replace(scored, variances_N=np.array([group.variance for group in groups], dtype=np.float64))

    def direction_cosines(self) -> Float[np.ndarray, "V V"]:
        """Compute the cosines between the directions; 0 for one of length 0."""
        norms_V = self._known.norms_V
        return influence_formulas.influence(self._known.products_VV, norms_V, norms_V, "cosine")

    def values(self, scored: Scored) -> Float[np.ndarray, "N V"]:
        """Compute the influence by the scorer's score, 0 for a zero gradient; see `influence_formulas.influence`."""
        return influence_formulas.influence(
            scored.products_NV, scored.norms_N, self.norms_V, self.score, scored.variances_N
        )

    def score_segments(
        self,
        segments: Sequence[Segment],
        count: int,
        advance: Callable[[int], None] | None = None,
        *,
        norms: bool = False,
    ) -> Scored:
        """Pass segments through the engine into `count` result rows. `exact` computes norms only with `norms`."""
        assert self._engine is not None, "segments need estimator='exact' or 'sketch'"
        after = by_group(advance)
        if self.estimator == "exact":
            exact = ExactReader(self._directions, count, norms=norms, repeated=self._engine.repeated)
            work = self._engine.run(segments, exact, after=after, divisible=not norms)
            norms_N = np.sqrt(exact.squares_N.clamp(min=0).numpy() if norms else np.full(count, np.nan))
            products_NV, features_ND = exact.products_NV.numpy(), None
        else:
            sketch = SketchReader(self._map, count, self.features_VD.dtype)
            work = self._engine.run(segments, sketch, after=after)
            features_ND = sketch.features_ND
            products_NV = (features_ND.double() @ self.features_VD.double().T).numpy()
            norms_N = features_ND.double().norm(dim=1).numpy()
        return Scored(products_NV, norms_N, [work.of(index) for index in range(count)], features_ND, work.tokens)

    def _by_reference(
        self,
        groups: Sequence[Group],
        factors: Sequence[Sequence[float]] | None,
        advance: Callable[[int], None] | None,
    ) -> Scored:
        products_NV = np.zeros((len(groups), len(self._directions)))
        norms_N, ratios, tokens = np.zeros(len(groups)), [RatioStatistics()] * len(groups), 0
        for index, group in enumerate(groups):
            if group.status != OK:
                continue
            own = None if factors is None else factors[index]
            found = prompt_gradient(self.model, group, self.settings, batch_tokens=self._batch_tokens, factors=own)
            products_NV[index] = [inner(found.gradients, direction) for direction in self._directions]
            norms_N[index] = norm(found.gradients)
            ratios[index] = found.ratios
            tokens += len(group.prompt_ids) * len(group.completions) + group.completion_tokens
            if advance is not None:
                advance(1)
        return Scored(products_NV, norms_N, ratios, None, tokens)

    def _make_map(self, names: Sequence[str] | None = None) -> GradientMap:
        """Make the map of all parameters, or of some."""
        assert self._engine is not None
        parameters = self._engine.parameters
        if names is not None:
            parameters = {name: parameters[name] for name in names}
        if self.projection.mask == "uniform":
            return UniformMap(self.projection, parameters)
        return StructuredMap(self.projection, parameters, self.layer_directions)

    def _layer_directions(self, directions: Sequence[Gradients], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute U of the linear layers with known mean inputs."""
        found = {}
        for name in sorted(means):
            stacked = torch.cat([direction[name] for direction in directions])
            found[name] = widened(principal_directions(stacked, means[name], self.projection.rank).to(stacked.dtype))
        return found


def scorer_of(model: nn.Module, settings: SurrogateSettings, options: ScorerOptions) -> Scorer:
    """Make a scorer. Where the engine does not cover the model, it uses `reference` instead, and a warning says so."""
    try:
        return Scorer(model, settings, options)
    except UncoveredError as error:
        if is_sharded(model):
            raise
        why = error.what
    scorer = Scorer(model, settings, replace(options, estimator="reference"))
    warn_once(f"{why}; they come from autograd instead, one prompt at a time, which is slower")
    return scorer


def half_factors(rewards: Sequence[float]) -> tuple[list[float], list[float]]:
    """Divide the trajectories of a group in two halves of similar rewards; return factors 0 and 1 of each half.

    Every other trajectory, in descending order of reward, goes to the first half.
    """
    order = sorted(range(len(rewards)), key=lambda k: (-rewards[k], k))
    first = [0.0] * len(rewards)
    for k in order[::2]:
        first[k] = 1.0
    return first, [1 - factor for factor in first]


def score_by_halves(scorer: Scorer, groups: Sequence[Group], advance: Callable[[int], None] | None = None) -> Scored:
    """Score groups with standard errors from two halves of each group's trajectories.

    The influence is s = s_1 + s_2, the contributions of the halves, and the error is |s_1 - s_2|. If the halves are
    exchangeable given the rewards, the expectation of its square is the variance of s. An error has one degree of
    freedom, so average squares over prompts. For `cosine` and `gain`, the error of the gradient's length is left out.

    A prompt is computed once per half, so its tokens count twice.
    """
    if scorer.estimator != "sketch":
        return _by_first_half(scorer, groups, advance)
    doubled = [group for group in groups for _ in range(2)]
    factors = [half for group in groups for half in half_factors(group.rewards)]
    scored = scorer(doubled, factors=factors)
    assert scored.features_ND is not None
    products_NHV = scored.products_NV.reshape(len(groups), 2, scored.products_NV.shape[1])
    features_ND = scored.features_ND.reshape(len(groups), 2, scored.features_ND.shape[1]).sum(dim=1)
    if advance is not None:
        advance(len(groups))
    with np.errstate(invalid="ignore"):  # infinite products give NaN, which the status reports
        sums_NV, differences_NV = products_NHV.sum(axis=1), np.abs(products_NHV[:, 0] - products_NHV[:, 1])
    whole = replace(
        scored,
        products_NV=sums_NV,
        norms_N=features_ND.double().norm(dim=1).numpy(),
        features_ND=features_ND,
        ratios=[first + second for first, second in zip(scored.ratios[::2], scored.ratios[1::2], strict=True)],
        variances_N=np.array([group.variance for group in groups], dtype=np.float64),
    )
    return replace(whole, errors_NV=scorer.values(replace(whole, products_NV=differences_NV)))


def _by_first_half(scorer: Scorer, groups: Sequence[Group], advance: Callable[[int], None] | None) -> Scored:
    """`score_by_halves` without features that would give the norm of a sum: the groups whole, then their first halves,
    and s_1 - s_2 = 2 s_1 - s."""
    whole = scorer(groups, advance=advance)
    first = scorer(groups, factors=[half_factors(group.rewards)[0] for group in groups])
    with np.errstate(invalid="ignore"):
        differences_NV = np.abs(2 * first.products_NV - whole.products_NV)
    errors_NV = scorer.values(replace(whole, products_NV=differences_NV))
    return replace(whole, tokens_computed=whole.tokens_computed + first.tokens_computed, errors_NV=errors_NV)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to where other processes can read them."""
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}
