"""The directions of validation sets: mean gradients, the same numbers on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from cropi.artifacts import OK
from cropi.errors import SignalError
from cropi.functional import influence as functional
from cropi.functional.agreement import spearman_brown
from cropi.gradients.engine import Engine, segment_of
from cropi.gradients.exact import DenseReader, ExactReader
from cropi.gradients.groups import Group
from cropi.gradients.numerics import inner, norm
from cropi.gradients.packing import Segment
from cropi.gradients.reference import prompt_gradient, trainable_parameters
from cropi.gradients.surrogate import SurrogateSettings
from cropi.world import World

PIECE = 16
"""Groups whose gradients are summed together, by one process."""

REFERENCE_TOKENS = 8192
"""Padded tokens of a forward pass of the reference estimator, unless told otherwise."""

Advance = Callable[[int], None] | None
LogRatios = Callable[[Sequence[Group]], list[list[float] | None]]


class Directions:
    """Makes directions one after the other. `mean_inputs` then holds, by the name of a linear layer's weight, the mean
    over tokens of what it was given, added up over the sets.

    A set's gradients are summed from pieces that do not depend on the number of processes, each by one process, and the
    pieces in float64: of float32 numbers of like size that sum is exact, whatever its order. So another number of
    processes changes no direction, nor the input directions that a structured mask takes from it, which follow small
    changes far. The sums lie in the host's memory, where there is room for them.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine | None,
        settings: SurrogateSettings,
        mean: Literal["plain", "normalized"],
        batch_tokens: int | None,
        log_ratios: LogRatios,
        world: World,
    ) -> None:
        """Without an engine by autograd. `log_ratios` of groups' trajectories, where the baseline needs them."""
        self._model, self._engine, self._settings, self._mean = model, engine, settings, mean
        self._batch_tokens, self._log_ratios, self._world = batch_tokens or REFERENCE_TOKENS, log_ratios, world
        self._parameters = trainable_parameters(model) if engine is None else engine.parameters
        self.mean_inputs: dict[str, Tensor] = {}

    def __call__(self, name: str, groups: Sequence[Group], advance: Advance) -> tuple[dict[str, Tensor], float]:
        """The mean gradient of a validation set by parameter name, and its reliability: the cosine between the means of
        every other prompt and of the others, stepped up to all of them (Spearman-Brown). NaN for a single prompt.
        """
        if not groups:
            raise SignalError("it has no group", where=f"validation set {name}", fix="give it prompts.")
        total, rest = self._halves(groups, advance)
        norms = norm(total) * norm(rest)
        halves = inner(total, rest) / norms if norms else math.nan
        for parameter, gradient in rest.items():
            total[parameter] += gradient
        return total, -math.inf if halves <= -1 else spearman_brown(halves)

    def _halves(self, groups: Sequence[Group], advance: Advance) -> list[dict[str, Tensor]]:
        """The part of the mean gradient that every other group makes up, and that of the others."""
        wide = [
            {name: torch.zeros(p.shape, dtype=torch.float64, device="cpu") for name, p in self._parameters.items()}
            for _ in (0, 1)
        ]
        matrices = self._engine.matrices if self._engine is not None else ()
        inputs = {
            name: torch.zeros(1 + self._parameters[name].shape[1], dtype=torch.float64, device="cpu")
            for name in matrices
        }
        for half, piece in self._world.share(pieces(groups)):
            if self._engine is None:
                found = self._by_autograd(piece, len(groups), advance)
            else:
                dense = self._by_engine(self._engine, piece, len(groups), advance)
                found = dense.gradients
                for layer, sums_I in dense.input_sums().items():
                    inputs[layer] += sums_I.cpu()
            for name, gradient in found.items():
                wide[half][name] += gradient.cpu()
        for sums in (*wide, inputs):
            self._world.add(sums)
        for layer, sums_I in inputs.items():
            mean_I = (sums_I[1:] / sums_I[0].clamp(min=1)).float()
            self.mean_inputs[layer] = self.mean_inputs.get(layer, 0.0) + mean_I.to(self._parameters[layer].device)
        return [{name: self._narrowed(name, total) for name, total in half.items()} for half in wide]

    def _narrowed(self, name: str, total: Tensor) -> Tensor:
        parameter = self._parameters[name]
        dtype = torch.float64 if self._engine is None else torch.promote_types(parameter.dtype, torch.float32)
        return total.to(parameter.device, dtype)

    def _by_engine(self, engine: Engine, groups: Sequence[Group], count: int, advance: Advance) -> DenseReader:
        """The groups' part of the mean gradient of `count` groups."""
        norms_M, logs = np.ones(len(groups)), self._log_ratios(groups)
        if self._mean == "normalized":
            nothing = [{name: torch.zeros_like(p) for name, p in engine.parameters.items()}]
            reader = ExactReader(nothing, len(groups), norms=True, repeated=engine.repeated)
            found = [segment_of(index, group, self._settings, None, logs[index]) for index, group in enumerate(groups)]
            engine.run([segment for segment in found if segment is not None], reader, divisible=False)
            norms_M = reader.squares_N.clamp(min=0).sqrt().numpy()
        weights = functional.mean_weights(norms_M, self._mean, count).tolist()
        dense = DenseReader(engine.parameters, engine.vocabulary)
        segments = [
            segment_of(index, group, self._settings, [weight] * len(group.completions), logs[index])
            for index, (group, weight) in enumerate(zip(groups, weights, strict=True))
        ]
        engine.run([segment for segment in segments if segment is not None], dense, after=by_group(advance))
        return dense

    def _by_autograd(self, groups: Sequence[Group], count: int, advance: Advance) -> dict[str, Tensor]:
        total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self._parameters.items()}
        for group in groups:
            if group.status != OK:
                continue
            found = prompt_gradient(self._model, group, self._settings, batch_tokens=self._batch_tokens)
            weight = functional.mean_weights(np.array([norm(found.gradients)]), self._mean, count)[0]
            for name, gradient in found.gradients.items():
                total[name] += gradient * weight
            if advance is not None:
                advance(1)
        return total


def pieces(groups: Sequence[Group]) -> list[tuple[int, Sequence[Group]]]:
    """A set's groups in pieces, each with its half."""
    halves = [groups[half::2] for half in (0, 1)]
    return [(half, all_[at : at + PIECE]) for half, all_ in enumerate(halves) for at in range(0, len(all_), PIECE)]


def by_group(advance: Advance) -> Callable[[Sequence[Segment]], None] | None:
    """Count the groups of a pack."""
    return None if advance is None else lambda members: advance(len({segment.index for segment in members}))
