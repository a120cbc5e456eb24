"""The scorer: one policy aimed at validation sets and asked about groups."""

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
from cropi.errors import PolicyError
from cropi.functional import influence as functional
from cropi.functional.projection import SparseProjection, principal_directions
from cropi.gradients.directions import (
    REFERENCE_TOKENS,
    Directions,
    Gradients,
    MeanGradients,
    by_autograd,
    by_engine,
    room_for_directions,
)
from cropi.gradients.eligible import require_rows_apart
from cropi.gradients.engine import Engine, Work, by_group, segment_of
from cropi.gradients.exact import ExactReader
from cropi.gradients.groups import Group
from cropi.gradients.numerics import inner, norm, widened
from cropi.gradients.packing import Segment
from cropi.gradients.ratios import FACTS, RatioMoments
from cropi.gradients.reference import prompt_gradient
from cropi.gradients.sharded import Shards
from cropi.gradients.sketch import GradientMap, SketchReader, StructuredMap, UniformMap, project
from cropi.gradients.surrogate import SurrogateSettings
from cropi.gradients.units import Units, mean_log_ratios, unit_rows, unit_signs, without_signal
from cropi.parallel import process_group

Estimator = Literal["exact", "sketch", "reference"]
Score = functional.Score

BLOCK = 256
"""Groups whose features are in memory at once; packs are filled from within a block."""

TRAJECTORIES = 512
"""Trajectories whose features are in memory at once where each has one of its own."""


@dataclass(frozen=True)
class Scored:
    """What is known of some groups, in their order; zeros where a group has nothing to learn from."""

    products_NV: Float[np.ndarray, "N V"]
    """<g_i, d_v>."""
    norms_N: Float[np.ndarray, " N"]
    """|g_i|; of the feature for `sketch`; NaN where nobody asked for it (`exact` with `dot`, without `lengths`)."""
    ratio_facts_NR: Float[np.ndarray, "N R"]
    """`ratios.FACTS` of each group; of no tokens (1, 0, 0) where nothing was computed."""
    features_ND: Tensor | None
    """Gradient features, for `sketch` alone."""
    tokens_computed: int
    errors_NV: Float[np.ndarray, "N V"] | None = None
    """Standard errors of the influence, if asked for: 0 without signal, NaN for fewer than three trajectories."""
    variances_N: Float[np.ndarray, " N"] | None = None
    """Of the rewards."""
    ratios: Sequence[RatioMoments] = ()
    """What the facts are made of, where an engine ran."""


@dataclass(frozen=True)
class Aim:
    """Validation directions, for another scorer of the same policy and settings."""

    directions: Sequence[Mapping[str, Tensor]]
    """Dense, for the estimators that meet them; `sketch` has met them already, and has none."""
    layer_directions: Mapping[str, Tensor]
    features_VD: Float[Tensor, "V D"] | None
    norms_V: Float[np.ndarray, " V"]


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that other processes can read."""
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


class Scorer:
    """One policy, one surrogate, one estimator; first aimed at validation sets, then asked about groups.

    The validation directions d_v are always exact: dense means of the groups' gradients (`plain`), or of the gradients
    scaled to length 1 (`normalized`). What differs is how a training group's gradient meets them:

    `exact`: without projection, by (2 + V) forward passes of work at most, often 3; `sketch`: through a
    `SparseProjection`, about 2; `reference`: by autograd, one group at a time, at least 3. `lengths`: have those
    of the gradients even where the score needs none. The ranks of a run aim together: each takes a share of the
    validation groups, and all get the same directions. After that each rank asks about groups of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: SurrogateSettings,
        *,
        estimator: Estimator = "sketch",
        score: Score = "dot",
        validation_mean: Literal["plain", "normalized"] = "plain",
        projection: SparseProjection | None = None,
        batch_tokens: int | None = None,
        lengths: bool = False,
    ) -> None:
        self.estimator, self.score, self._mean = estimator, score, validation_mean
        self._lengths = lengths or score != "dot"
        self.projection = projection or SparseProjection()
        self.layer_directions: dict[str, Tensor] = {}
        self.settings = settings
        self.model, self._batch_tokens = model, batch_tokens or REFERENCE_TOKENS
        if estimator == "reference" and Shards(model).sharded:
            raise PolicyError(
                "the reference estimator differentiates by whole parameters, and the policy's are sharded",
                where="score.estimator",
                fix="use sketch or exact.",
            )
        if estimator == "reference":
            require_rows_apart(model)
        self._engine = None if estimator == "reference" else Engine(model, settings, batch_tokens)
        self._ranks = process_group() if self._engine is None else self._engine.shards.ranks()

    def aim(
        self,
        validation: Mapping[str, Sequence[Group]],
        advance: Callable[[int], None] | None = None,
        layer_directions: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Make the directions of validation sets. SignalError where one is empty or not a finite number.

        Afterwards `direction_reliability` holds, by set, the correlation in direction to be expected between this
        direction and one from as many other prompts: see `Directions.reliability_V`.

        `layer_directions` are the U of a structured mask by parameter name, where features of earlier work are to be
        compared; by default they are made from the validation sets.
        """
        self._known = Directions(list(validation))
        if self._engine is None:
            gradients = by_autograd(self.model, self.settings, self._batch_tokens, validation, self._mean, advance)
            self._directions = self._known.add(gradients.of(gradients.names))
        else:
            gradients = by_engine(self._engine, validation, self._mean, advance)
            parts = gradients.parts(room_for_directions(self._engine))
            self.aimed_in_parts = len(parts)
            if self.estimator == "exact":
                self._aim_exact(gradients, parts)
            else:
                self._aim_sketch(gradients, parts, layer_directions)
        self.direction_reliability = dict(zip(validation, self._known.reliability_V.tolist(), strict=True))
        if self.estimator == "sketch":
            self._norms_V = self.features_VD.double().norm(dim=1).numpy()
        else:
            self._norms_V = self._known.norms_V

    def _aim_exact(self, gradients: MeanGradients, parts: Sequence[Sequence[str]]) -> None:
        self._directions = [{} for _ in self._known.norms_V]
        for names in parts:
            for direction, found in zip(self._directions, self._known.add(gradients.of(names)), strict=True):
                direction |= found

    def _aim_sketch(
        self, gradients: MeanGradients, parts: Sequence[Sequence[str]], layer_directions: Mapping[str, Tensor] | None
    ) -> None:
        """Of a direction, only what the projection makes of it stays."""
        assert self._engine is not None
        structured, device = self.projection.mask == "structured", self._engine.device
        given = layer_directions if structured and layer_directions else {}
        self.layer_directions = {name: columns.to(device) for name, columns in given.items()}
        self._ranks.copy_main(self.layer_directions)
        features = []
        for names in parts:
            directions = self._known.add(gradients.of(names))
            if structured and not given:
                found = self._layer_directions(directions, gradients.mean_inputs)
                self._ranks.copy_main(found)
                self.layer_directions |= found
            self._map = self._make_map(names)
            features.append(torch.stack([project(self._map, direction) for direction in directions]).cpu())
            del directions
        if len(parts) > 1:
            self._map = self._make_map()
        self.features_VD = torch.stack(features).sum(dim=0)
        self._ranks.copy_main({"features": self.features_VD})

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """For parameters that are sharded over processes: score inside as many groups as there are, in as many calls as
        need be, each process its own; see `Engine.lockstep`. A call outside is such a block by itself."""
        with nullcontext() if self._engine is None else self._engine.lockstep():
            yield

    @property
    def aimed(self) -> Aim:
        """For `aim_as`."""
        if self.estimator == "sketch":
            return Aim((), _on_cpu(self.layer_directions), self.features_VD, self._norms_V)
        return Aim([_on_cpu(direction) for direction in self._directions], {}, None, self._norms_V)

    def aim_as(self, aim: Aim) -> None:
        """Take over what another scorer has been aimed at: no gradient is computed."""
        places = {name: parameter.device for name, parameter in self.model.named_parameters()}
        self._norms_V = aim.norms_V
        self._directions = [{name: d.to(places[name]) for name, d in dense.items()} for dense in aim.directions]
        if aim.features_VD is not None:
            self.layer_directions = {name: U.to(places[name]) for name, U in aim.layer_directions.items()}
            self._map, self.features_VD = self._make_map(), aim.features_VD

    def __call__(
        self,
        groups: Sequence[Group],
        *,
        factors: Sequence[Sequence[float]] | None = None,
        standard_errors: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Scored:
        """Score a block of groups. `factors` multiply the weights of each group's trajectories.

        `standard_errors`: each with its jackknife error. Trajectories do not share their prompt then, which costs the
        prompts' tokens K times. ValueError for the reference estimator, and for `exact` with a score that needs
        lengths, hence the inner product of any two trajectories.
        """
        with self.lockstep():
            if standard_errors:
                scored = self._with_errors(groups, advance)
            elif self._engine is None:
                scored = self._by_reference(groups, advance)
            else:
                scored = self._by_engine(groups, factors, advance)
        return replace(scored, variances_N=np.array([group.variance for group in groups], dtype=np.float64))

    def _by_engine(
        self,
        groups: Sequence[Group],
        factors: Sequence[Sequence[float]] | None,
        advance: Callable[[int], None] | None,
    ) -> Scored:
        assert self._engine is not None
        logs = mean_log_ratios(self._engine, groups)
        found = [
            segment_of(index, group, self.settings, None if factors is None else factors[index], logs[index])
            for index, group in enumerate(groups)
        ]
        segments = [segment for segment in found if segment is not None]
        return self._pass(segments, len(groups), advance, norms=self._lengths)[0]

    def units(
        self, groups: Sequence[Group], *, grams: bool = False, advance: Callable[[int], None] | None = None
    ) -> Iterator[tuple[Units, Tensor | None, int]]:
        """Of each group in turn: what its influence is made of, the features (K, D) of its trajectories (`sketch`), and
        the tokens computed. `grams`: with the inner products of its trajectories, which `sketch` alone has.
        """
        if self._engine is None:
            raise ValueError("trajectories are told apart by estimator='exact' or 'sketch' only")
        if grams and self.estimator == "exact":
            raise ValueError("inner products of trajectories need estimator='sketch'")
        block: list[Group] = []
        for group in groups:
            if block and sum(len(g.completions) for g in [*block, group]) > TRAJECTORIES:
                yield from self._units(block, grams, advance)
                block = []
            block.append(group)
        if block:
            yield from self._units(block, grams, advance)

    def _units(
        self, groups: Sequence[Group], grams: bool, advance: Callable[[int], None] | None
    ) -> Iterator[tuple[Units, Tensor | None, int]]:
        starts, segments = unit_rows(groups, self.settings)
        scored, ratios = self._pass([s for own in segments for s in own], starts[-1], None, norms=False)
        for start, group, own in zip(starts, groups, segments, strict=False):
            part = slice(start, start + len(group.completions))
            features_KD = None if scored.features_ND is None else scored.features_ND[part]
            if advance is not None:
                advance(1)
            if group.status != OK:
                yield without_signal(group, scored.products_NV.shape[1]), features_KD, 0
                continue
            signs_K = unit_signs(group, self.settings)
            gram_KK = None
            if grams:
                assert features_KD is not None
                wide_KD = features_KD.double()
                gram_KK = (wide_KD @ wide_KD.T).numpy() * np.outer(signs_K, signs_K)
            units = replace(
                without_signal(group, 0),
                products_KV=scored.products_NV[part] * signs_K[:, None],
                gram_KK=gram_KK,
                ratios=[ratios.of(row) for row in range(part.start, part.stop)],
            )
            yield units, features_KD, sum(segment.tokens for segment in own)

    def _with_errors(self, groups: Sequence[Group], advance: Callable[[int], None] | None) -> Scored:
        grams = self.score != "dot"
        if grams and self.estimator != "sketch":
            raise ValueError(f"standard errors with score={self.score!r} need estimator='sketch'")
        settings, products, norms, facts, errors, features = self.settings, [], [], [], [], []
        computed = 0
        for group, (units, features_KD, tokens) in zip(
            groups, self.units(groups, grams=grams, advance=advance), strict=True
        ):
            mixed = group.status == OK
            products.append(units.products(settings)[0] if mixed else np.zeros(len(self._norms_V)))
            facts.append(units.total().facts)
            errors.append(units.errors(settings, self.score, self._norms_V) if mixed else np.zeros(len(self._norms_V)))
            computed += tokens
            if features_KD is None:
                norms.append(math.nan)
                continue
            scales_K = units.scales(settings)[0] * unit_signs(group, settings) if mixed else np.zeros(len(features_KD))
            kept = np.flatnonzero(scales_K)  # what adds nothing may hold numbers that are not finite
            features.append(torch.from_numpy(scales_K[kept]).to(features_KD.dtype) @ features_KD[kept])
            norms.append(float(features[-1].double().norm()))
        shape = (len(groups), len(self._norms_V))
        return Scored(
            np.array(products).reshape(shape),
            np.array(norms),
            np.array(facts).reshape(len(groups), len(FACTS)),
            torch.stack(features) if features else None,
            computed,
            np.array(errors).reshape(shape),
        )

    def direction_cosines(self) -> Float[np.ndarray, "V V"]:
        """Cosines between the directions that the scorer is aimed at; 0 for one of length 0."""
        norms_V = self._known.norms_V
        return functional.influence(self._known.products_VV, norms_V, norms_V, "cosine")

    def values(self, scored: Scored) -> Float[np.ndarray, "N V"]:
        """Influence by the scorer's score, 0 for a zero gradient: see `functional.influence`."""
        return functional.influence(scored.products_NV, scored.norms_N, self._norms_V, self.score, scored.variances_N)

    def _pass(
        self, segments: Sequence[Segment], count: int, advance: Callable[[int], None] | None, *, norms: bool
    ) -> tuple[Scored, Work]:
        """Segments through the engine: `count` rows of products, lengths (of `exact` only with `norms`) and facts."""
        assert self._engine is not None
        after = by_group(advance)
        if self.estimator == "exact":
            exact = ExactReader(self._directions, count, norms=norms, repeated=self._engine.repeated)
            work = self._engine.run(segments, exact, after=after, divisible=not norms)
            squares_N = exact.squares_N.clamp(min=0).numpy() if norms else np.full(count, np.nan)
            return Scored(exact.products_NV.numpy(), np.sqrt(squares_N), _facts(work, count), None, work.tokens), work
        sketch = SketchReader(self._map, count, self.features_VD.dtype)
        work = self._engine.run(segments, sketch, after=after)
        features_ND = sketch.features_ND
        products_NV = (features_ND.double() @ self.features_VD.double().T).numpy()
        norms_N = features_ND.double().norm(dim=1).numpy()
        scored = Scored(products_NV, norms_N, _facts(work, count), features_ND, work.tokens)
        return replace(scored, ratios=[work.of(index) for index in range(count)]), work

    def _by_reference(self, groups: Sequence[Group], advance: Callable[[int], None] | None) -> Scored:
        products_NV = np.zeros((len(groups), len(self._directions)))
        norms_N, facts_NR = np.zeros(len(groups)), np.tile(RatioMoments().facts, (len(groups), 1))
        tokens = 0
        for index, group in enumerate(groups):
            if group.status != OK:
                continue
            found = prompt_gradient(self.model, group, self.settings, batch_tokens=self._batch_tokens)
            products_NV[index] = [inner(found.gradients, direction) for direction in self._directions]
            norms_N[index] = norm(found.gradients)
            facts_NR[index] = found.ratio_ess, found.clip_share, found.kl
            tokens += len(group.prompt_ids) * len(group.completions) + group.completion_tokens
            if advance is not None:
                advance(1)
        return Scored(products_NV, norms_N, facts_NR, None, tokens)

    def _make_map(self, names: Sequence[str] | None = None) -> GradientMap:
        """The map of all parameters, or of some."""
        assert self._engine is not None
        parameters = self._engine.parameters
        if names is not None:
            parameters = {name: parameters[name] for name in names}
        if self.projection.mask == "uniform":
            return UniformMap(self.projection, parameters)
        return StructuredMap(self.projection, parameters, self.layer_directions, self._engine.vocabulary)

    def _layer_directions(self, directions: Sequence[Gradients], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """U of the linear layers whose mean inputs are given."""
        found = {}
        for name in sorted(means):
            stacked = torch.cat([direction[name] for direction in directions])
            found[name] = widened(principal_directions(stacked, means[name], self.projection.rank).to(stacked.dtype))
        return found


def _facts(work: Work, count: int) -> Float[np.ndarray, "N R"]:
    return np.array([work.of(index).facts for index in range(count)]).reshape(count, len(FACTS))
