"""Influence of groups on validation sets, in memory: `cropi.influence`, and the scorer that the `score` stage uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cropi.artifacts import NO_SIGNAL, NON_FINITE, OK
from cropi.errors import SignalError
from cropi.functional import influence as functional
from cropi.functional.projection import SparseProjection, principal_directions
from cropi.functional.surrogate import Normalizer
from cropi.gradients.engine import Engine, Work, segment_of
from cropi.gradients.exact import DenseReader, ExactReader
from cropi.gradients.groups import Group
from cropi.gradients.numerics import widened
from cropi.gradients.packing import Segment
from cropi.gradients.reference import prompt_gradient, trainable_parameters
from cropi.gradients.sketch import GradientMap, SketchReader, StructuredMap, UniformMap, project
from cropi.gradients.surrogate import SurrogateSettings

Estimator = Literal["exact", "sketch", "reference"]
Score = Literal["dot", "cosine"]

BLOCK = 256
"""Groups whose features are in memory at once; packs are filled from within a block."""

REFERENCE_TOKENS = 8192
"""Padded tokens of a forward pass of the reference estimator, unless told otherwise."""


@dataclass(frozen=True)
class Scored:
    """What is known of some groups, in their order; zeros where a group has nothing to learn from."""

    products_NV: Float[np.ndarray, "N V"]
    """<g_i, d_v>."""
    norms_N: Float[np.ndarray, " N"]
    """|g_i|; of the feature for `sketch`; NaN where nobody asked for it (`exact` without cosine)."""
    ratio_ess_N: Float[np.ndarray, " N"]
    features_ND: Tensor | None
    """Gradient features, for `sketch` alone."""
    tokens_computed: int


class Scorer:
    """One policy, one surrogate, one estimator; first aimed at validation sets, then asked about groups.

    The validation directions d_v are always exact: dense means of the groups' gradients (`plain`), or of the gradients
    scaled to length 1 (`normalized`). What differs is how a training group's gradient meets them:

    `exact`: without projection, by (2 + V) forward passes of work at most, often 3; `sketch`: through a
    `SparseProjection`, about 2; `reference`: by autograd, one group at a time, at least 3.
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
    ) -> None:
        self.estimator, self.score, self._mean = estimator, score, validation_mean
        self.projection = projection or SparseProjection()
        self.layer_directions: dict[str, Tensor] = {}
        self._model, self._settings, self._batch_tokens = model, settings, batch_tokens
        self._engine = None if estimator == "reference" else Engine(model, settings, batch_tokens)

    def aim(
        self,
        validation: Mapping[str, Sequence[Group]],
        advance: Callable[[int], None] | None = None,
        layer_directions: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Make the directions of validation sets. SignalError where one is empty or not a finite number.

        `layer_directions` are the U of a structured mask by parameter name, where features of earlier work are to be
        compared; by default they are made from the validation sets.
        """
        self._mean_inputs: dict[str, Tensor] = {}
        self._directions = [self._direction(name, groups, advance) for name, groups in validation.items()]
        self._norms_V = np.array([_norm(direction) for direction in self._directions])
        for name, length in zip(validation, self._norms_V, strict=True):
            if not np.isfinite(length):
                raise SignalError(
                    f"the gradient of validation set {name} is not a finite number",
                    where=f"validation set {name}",
                    fix="check its behaviour log-probs and rewards; a policy that has diverged cannot be scored: "
                    "lower trainer.learning_rate.",
                )
        if self.estimator == "sketch":
            if self.projection.mask == "structured":
                self.layer_directions = dict(layer_directions or self._make_layer_directions())
            self._map = self._make_map()
            self.features_VD = torch.stack([project(self._map, direction) for direction in self._directions]).cpu()
            self._norms_V = self.features_VD.double().norm(dim=1).numpy()

    def __call__(
        self,
        groups: Sequence[Group],
        *,
        factors: Sequence[Sequence[float]] | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> Scored:
        """Score a block of groups. `factors` multiply the weights of each group's trajectories."""
        if self._engine is None:
            return self._by_reference(groups, advance)
        found = [
            segment_of(index, group, self._settings, None if factors is None else factors[index])
            for index, group in enumerate(groups)
        ]
        return self._run([segment for segment in found if segment is not None], len(groups), advance)

    def trajectories(self, group: Group) -> Float[np.ndarray, "K V"]:
        """Each trajectory's part of the inner products of one group: they add up to the group's (`exact`, `sketch`).

        Trajectories do not share their prompt here, so this costs more than the group as a whole.
        """
        segments = []
        for k in range(len(group.completions)):
            alone = [float(other == k) for other in range(len(group.completions))]
            segment = segment_of(k, group, self._settings, alone)
            if segment is not None:
                segments.append(segment)
        return self._run(segments, len(group.completions), None).products_NV

    def values(self, scored: Scored) -> Float[np.ndarray, "N V"]:
        """Influence: the inner products (`dot`), or these over both lengths (`cosine`); 0 for a zero gradient."""
        return functional.influence(scored.products_NV, scored.norms_N, self._norms_V, self.score)

    def _run(self, segments: Sequence[Segment], count: int, advance: Callable[[int], None] | None) -> Scored:
        assert self._engine is not None
        after = _by_group(advance)
        if self.estimator == "exact":
            norms = self.score == "cosine"
            exact = ExactReader(self._directions, count, norms=norms, repeated=self._engine.repeated)
            work = self._engine.run(segments, exact, after=after, divisible=not norms)
            squares_N = exact.squares_N.clamp(min=0).numpy() if norms else np.full(count, np.nan)
            return Scored(exact.products_NV.numpy(), np.sqrt(squares_N), _shares(work, count), None, work.tokens)
        sketch = SketchReader(self._map, count, self.features_VD.dtype)
        work = self._engine.run(segments, sketch, after=after)
        features_ND = sketch.features_ND
        products_NV = (features_ND.double() @ self.features_VD.double().T).numpy()
        norms_N = features_ND.double().norm(dim=1).numpy()
        return Scored(products_NV, norms_N, _shares(work, count), features_ND, work.tokens)

    def _by_reference(self, groups: Sequence[Group], advance: Callable[[int], None] | None) -> Scored:
        products_NV = np.zeros((len(groups), len(self._directions)))
        norms_N, shares_N = np.zeros(len(groups)), np.ones(len(groups))
        tokens = 0
        for index, group in enumerate(groups):
            if group.status != OK:
                continue
            found = prompt_gradient(
                self._model, group, self._settings, batch_tokens=self._batch_tokens or REFERENCE_TOKENS
            )
            products_NV[index] = [_inner(found.gradients, direction) for direction in self._directions]
            norms_N[index], shares_N[index] = _norm(found.gradients), found.ratio_ess
            tokens += len(group.prompt_ids) * len(group.completions) + group.completion_tokens
            if advance is not None:
                advance(1)
        return Scored(products_NV, norms_N, shares_N, None, tokens)

    def _direction(
        self, name: str, groups: Sequence[Group], advance: Callable[[int], None] | None
    ) -> dict[str, Tensor]:
        """The mean gradient of a validation set by parameter name."""
        if not groups:
            raise SignalError("it has no group", where=f"validation set {name}", fix="give it prompts.")
        if self._engine is None:
            return self._reference_direction(groups, advance)
        after = _by_group(advance)
        norms_M = np.ones(len(groups))
        if self._mean == "normalized":
            nothing = [{name: torch.zeros_like(p) for name, p in self._engine.parameters.items()}]
            reader = ExactReader(nothing, len(groups), norms=True, repeated=self._engine.repeated)
            found = [segment_of(index, group, self._settings) for index, group in enumerate(groups)]
            self._engine.run([segment for segment in found if segment is not None], reader, divisible=False)
            norms_M = reader.squares_N.clamp(min=0).sqrt().numpy()
        weights = functional.mean_weights(norms_M, self._mean).tolist()
        dense = DenseReader(self._engine.parameters, self._engine.vocabulary)
        segments = [
            segment_of(index, group, self._settings, [weight] * len(group.completions))
            for index, (group, weight) in enumerate(zip(groups, weights, strict=True))
        ]
        self._engine.run([segment for segment in segments if segment is not None], dense, after=after)
        for layer, mean_I in dense.mean_inputs().items():
            self._mean_inputs[layer] = self._mean_inputs.get(layer, 0.0) + mean_I
        return dense.gradients

    def _reference_direction(self, groups: Sequence[Group], advance: Callable[[int], None] | None) -> dict[str, Tensor]:
        total = {
            name: torch.zeros_like(p, dtype=torch.float64) for name, p in trainable_parameters(self._model).items()
        }
        for group in groups:
            if group.status != OK:
                continue
            found = prompt_gradient(
                self._model, group, self._settings, batch_tokens=self._batch_tokens or REFERENCE_TOKENS
            )
            weight = functional.mean_weights(np.array([_norm(found.gradients)]), self._mean)[0] / len(groups)
            for name, gradient in found.gradients.items():
                total[name] += gradient * weight
            if advance is not None:
                advance(1)
        return total

    def _make_map(self) -> GradientMap:
        assert self._engine is not None
        parameters = self._engine.parameters
        if self.projection.mask == "uniform":
            return UniformMap(self.projection, parameters)
        return StructuredMap(self.projection, parameters, self.layer_directions, self._engine.vocabulary)

    def _make_layer_directions(self) -> dict[str, Tensor]:
        assert self._engine is not None
        found = {}
        for name in sorted(self._engine.matrices):
            stacked = torch.cat([direction[name] for direction in self._directions])
            found[name] = widened(
                principal_directions(stacked, self._mean_inputs[name], self.projection.rank).to(stacked.dtype)
            )
        return found


@dataclass(frozen=True)
class InfluenceScores:
    """The result of `cropi.influence`."""

    values: Float[np.ndarray, "N V"]
    """Influence of each prompt on each validation set, float64, in the orders given; 0 where there is no signal."""
    status: list[str]
    """Per prompt: `ok`, `no_signal` (all rewards equal, or no completion token), `non_finite` (its own numbers)."""
    validation: list[str]
    """Names of the validation sets."""
    ratio_ess: Float[np.ndarray, " N"]
    """Effective share of the tokens after importance weighting, in (0, 1]: 1 on-policy."""
    trajectories: list[Float[np.ndarray, "K V"]] | None
    """Per prompt, each trajectory's part of the inner products, if asked for."""
    tokens_given: int
    """Tokens of all training trajectories, prompts counted for each."""
    tokens_computed: int
    """Tokens that went through the policy for the training prompts."""


def influence(
    policy: nn.Module,
    train: Sequence[Group],
    validation: Mapping[str, Sequence[Group]],
    *,
    estimator: Estimator = "sketch",
    normalizer: Normalizer = "sequence",
    score: Score = "dot",
    advantage_std: bool = True,
    max_completion_length: int | None = None,
    temperature: float = 1.0,
    validation_mean: Literal["plain", "normalized"] = "plain",
    projection: SparseProjection | None = None,
    per_trajectory: bool = False,
    batch_tokens: int | None = None,
) -> InfluenceScores:
    """Influence of every training prompt on every validation set at the policy's current weights.

    Inf_v(i) = <g_i, (1/M) sum_m g_m> with g the gradient of a prompt's off-policy surrogate
    sum_k (1/Z_k) sum_t rho_{k,t} A_k (paper eq. 4 and its definition of influence): to first order, what a step along
    g_i adds to the validation objective. `score="cosine"` divides by both lengths, as the paper's experiments do.

    policy: a transformers causal LM, or a PEFT model around one; gradients are those of its trainable parameters.
    train, validation: groups of trajectories; the validation sets' order is the mapping's.
    estimator: `sketch` (about 2 forward passes of work per token), `exact` (no projection), `reference` (autograd).
    normalizer: Z_k, see `cropi.functional.surrogate.normalizers`; `constant` needs `max_completion_length`.
    advantage_std: divide advantages by the group's standard deviation (GRPO) or not (Dr. GRPO).
    temperature: the one that the trajectories were sampled with.
    per_trajectory: also give each trajectory's part, for error bars; costs another pass without shared prompts.
    batch_tokens: tokens of a forward pass; by default what memory allows.

    A group without signal, or whose own numbers are not finite, gets 0 and a status, and changes nothing for others.
    Raises SignalError where a validation set has no group with signal or a direction that is not finite, ValueError for
    `constant` without a length, PolicyError for an architecture that the engine does not cover.
    """
    if normalizer == "constant" and max_completion_length is None:
        raise ValueError("normalizer='constant' needs max_completion_length, in tokens")
    if per_trajectory and estimator == "reference":
        raise ValueError("per_trajectory needs estimator='exact' or 'sketch'")
    settings = SurrogateSettings(normalizer, max_completion_length or 1, temperature, advantage_std)
    scorer = Scorer(
        policy,
        settings,
        estimator=estimator,
        score=score,
        validation_mean=validation_mean,
        projection=projection,
        batch_tokens=batch_tokens,
    )
    for name, groups in validation.items():
        if not any(group.status == OK for group in groups):
            raise SignalError(
                "no group of it has both better and worse completions, so it gives no direction",
                where=f"validation set {name}",
                fix="use problems that the policy solves sometimes, or more completions for each.",
            )
    scorer.aim(validation)
    values, shares, tokens = [], [], 0
    for start in range(0, len(train), BLOCK):
        scored = scorer(train[start : start + BLOCK])
        values.append(scorer.values(scored))
        shares.append(scored.ratio_ess_N)
        tokens += scored.tokens_computed
    values_NV = np.concatenate(values) if values else np.zeros((0, len(validation)))
    status = statuses(train, values_NV)
    return InfluenceScores(
        values=np.where(np.isfinite(values_NV).all(axis=1, keepdims=True), values_NV, 0.0),
        status=status,
        validation=list(validation),
        ratio_ess=np.concatenate(shares) if shares else np.zeros(0),
        trajectories=_trajectories(scorer, train, status) if per_trajectory else None,
        tokens_given=sum(len(g.prompt_ids) * len(g.completions) + g.completion_tokens for g in train),
        tokens_computed=tokens,
    )


def _by_group(advance: Callable[[int], None] | None) -> Callable[[Sequence[Segment]], None] | None:
    """Count the groups of a pack."""
    return None if advance is None else lambda members: advance(len({segment.index for segment in members}))


def _trajectories(scorer: Scorer, groups: Sequence[Group], status: Sequence[str]) -> list[Float[np.ndarray, "K V"]]:
    """Zeros for groups that have no influence."""
    parts = [scorer.trajectories(group) for group in groups]
    return [part if of_group == OK else np.zeros(part.shape) for part, of_group in zip(parts, status, strict=True)]


def statuses(groups: Sequence[Group], values_NV: Float[np.ndarray, "N V"]) -> list[str]:
    """Status of each group, given its influence."""
    finite_N = np.isfinite(values_NV).all(axis=1)
    return [
        NO_SIGNAL if group.status != OK else OK if finite else NON_FINITE
        for group, finite in zip(groups, finite_N, strict=True)
    ]


def _shares(work: Work, count: int) -> Float[np.ndarray, " N"]:
    return np.array([work.effective_share(index) for index in range(count)])


def _inner(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    return float(sum((first[name].double() * second[name].double()).sum() for name in first))


def _norm(gradients: Mapping[str, Tensor]) -> float:
    return _inner(gradients, gradients) ** 0.5
