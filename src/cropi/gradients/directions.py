"""Directions, the mean gradients of validation sets: what groups are scored against.

They are dense, and those of a large policy are larger than the policy. So they can be made of a part of the parameters
at a time, by passes of the validation sets for each part. Where parameters are sharded, each process computes a share
of the groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cropi.errors import SignalError
from cropi.functional import influence as functional
from cropi.functional.agreement import spearman_brown
from cropi.gradients.engine import Engine, by_group, free_bytes, segment_of
from cropi.gradients.exact import DenseReader, ExactReader
from cropi.gradients.groups import Group
from cropi.gradients.numerics import inner
from cropi.gradients.packing import Segment
from cropi.gradients.units import mean_log_ratios

Gradients = dict[str, Tensor]
Halves = tuple[Gradients, Gradients]
"""Two parts that a mean gradient is the sum of: of every other prompt of a validation set, and of the others."""

MEMORY_SHARE = 0.25
"""Of the memory that is free, what dense gradients may take."""


def halves_of(validation: Mapping[str, Sequence[Group]]) -> list[tuple[Sequence[Group], Sequence[Group]]]:
    """Every other group of each set, and the others. SignalError for an empty set."""
    for name, groups in validation.items():
        if not groups:
            raise SignalError("it has no group", where=f"validation set {name}", fix="give it prompts.")
    return [(groups[0::2], groups[1::2]) for groups in validation.values()]


class Directions:
    """What is known of V directions, gathered from their halves by parts of the parameters."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, count = names, len(names)
        self.products_VV = np.zeros((count, count))
        """Their inner products."""
        self._within_V3 = np.zeros((count, 3))

    def add(self, halves_V: Iterable[Halves]) -> list[Gradients]:
        """Takes the halves' gradients of further parameters, and gives the directions' own. SignalError where one is
        not finite."""
        found = []
        for v, (first, rest) in enumerate(halves_V):
            self._within_V3[v] += inner(first, first), inner(rest, rest), inner(first, rest)
            while rest:  # emptied on the way, before the next set's are made
                name, gradient = rest.popitem()
                first[name] += gradient
                del gradient
            found.append(first)
        self.products_VV += [[inner(one, other) for other in found] for one in found]
        for name, length in zip(self._names, self.norms_V, strict=True):
            if not np.isfinite(length):
                raise SignalError(
                    f"the gradient of validation set {name} is not a finite number",
                    where=f"validation set {name}",
                    fix="check its behaviour log-probs and rewards; a policy that has diverged cannot be scored: "
                    "lower trainer.learning_rate.",
                )
        return found

    @property
    def norms_V(self) -> Float[np.ndarray, " V"]:
        return np.sqrt(self.products_VV.diagonal())

    @property
    def reliability_V(self) -> Float[np.ndarray, " V"]:
        """The cosine between the halves, stepped up to the whole set (Spearman-Brown): the correlation in direction to
        be expected with one from as many other prompts. NaN where a half is 0, as it is for a single prompt."""
        found = []
        for first, rest, between in self._within_V3:
            norms = first**0.5 * rest**0.5
            cosine = between / norms if norms else math.nan
            found.append(-math.inf if cosine <= -1 else spearman_brown(cosine))
        return np.array(found)


class MeanGradients:
    """The mean gradients of validation sets, by halves, of whatever parameters are asked for."""

    def __init__(
        self,
        engine: Engine,
        validation: Mapping[str, Sequence[Group]],
        mean: Literal["plain", "normalized"],
        advance: Callable[[int], None] | None = None,
    ) -> None:
        self._engine, self._advance = engine, advance
        self.mean_inputs: dict[str, Tensor] = {}
        """What each linear layer is given, by the name of its weight: means over the tokens of each half, added up;
        float64."""
        shards = engine.shards
        with engine.lockstep():
            self._segments_V = [
                [self._weighted(half[shards.rank :: shards.count], sum(map(len, both)), mean) for half in both]
                for both in halves_of(validation)
            ]

    def parts(self) -> list[list[str]]:
        """Names of the parameters, so many at a time as memory allows to hold the dense gradients of."""
        engine, sets = self._engine, len(self._segments_V)
        room = engine.shards.least(int(free_bytes(engine.device) * MEMORY_SHARE))
        found: list[list[str]] = [[]]
        left = most = room // (4 * (sets + 1))  # all sets' first halves, and the second of one
        for name, parameter in engine.parameters.items():
            if parameter.numel() > left and found[-1]:
                found.append([])
                left = most
            found[-1].append(name)
            left -= parameter.numel()
        return found

    def of(self, names: Sequence[str]) -> Iterator[Halves]:
        """Of each set in turn both halves' gradients; afterwards `mean_inputs` are those of these parameters."""
        self.mean_inputs = {}
        for first, rest in self._segments_V:
            yield self._sum(first, names), self._sum(rest, names)
        self._advance = None  # every group has been met

    def _sum(self, segments: Sequence[Segment], names: Sequence[str]) -> Gradients:
        engine = self._engine
        reader = DenseReader({name: engine.parameters[name] for name in names}, engine.vocabulary)
        engine.run(segments, reader, after=by_group(self._advance))
        engine.add_up(reader.gradients)
        for name in sorted(engine.matrices.intersection(names)):
            ins = engine.parameters[name].shape[1]
            inputs_1I = reader.inputs.get(name, torch.zeros(1 + ins, dtype=torch.float64, device=engine.device))
            engine.add_up({name: inputs_1I})
            mean_I = inputs_1I[1:] / inputs_1I[0].clamp(min=1)
            self.mean_inputs[name] = self.mean_inputs.get(name, 0.0) + mean_I
        return reader.gradients

    def _weighted(self, groups: Sequence[Group], count: int, mean: Literal["plain", "normalized"]) -> list[Segment]:
        """What is to be computed of a share of `count` groups, each with its weight in their mean."""
        engine, settings = self._engine, self._engine.settings
        logs, norms_M = mean_log_ratios(engine, groups), np.ones(len(groups))
        if mean == "normalized":
            zero = torch.zeros((), device=engine.device)
            nothing = {
                name: zero.to(torch.promote_types(p.dtype, zero.dtype)).expand(p.shape)
                for name, p in engine.parameters.items()
            }
            reader = ExactReader([nothing], len(groups), norms=True, repeated=engine.repeated)
            found = [segment_of(index, group, settings, None, logs[index]) for index, group in enumerate(groups)]
            engine.run([segment for segment in found if segment is not None], reader, divisible=False)
            norms_M = reader.squares_N.clamp(min=0).sqrt().numpy()
        weights = functional.mean_weights(norms_M, mean, count).tolist()
        found = [
            segment_of(index, group, settings, [weight] * len(group.completions), logs[index])
            for index, (group, weight) in enumerate(zip(groups, weights, strict=True))
        ]
        return [segment for segment in found if segment is not None]
