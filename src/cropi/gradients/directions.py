"""Directions, the mean gradients of validation sets: what groups are scored against.

They are the same numbers on any number of processes. They are dense, and those of a large policy are larger than the
policy, so they can be made of a part of the parameters at a time, by passes of the validation sets for each part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cropi.artifacts import OK
from cropi.errors import SignalError
from cropi.functional import influence as functional
from cropi.functional.agreement import spearman_brown
from cropi.gradients.engine import Engine, by_group, free_bytes, segment_of
from cropi.gradients.exact import DenseReader, ExactReader
from cropi.gradients.groups import Group
from cropi.gradients.numerics import inner, norm
from cropi.gradients.packing import Segment
from cropi.gradients.reference import prompt_gradient, trainable_parameters
from cropi.gradients.surrogate import SurrogateSettings
from cropi.gradients.units import mean_log_ratios
from cropi.parallel import ProcessGroup, process_group

PIECE = 16
"""Groups whose gradients are summed together, by one process."""

REFERENCE_TOKENS = 8192
"""Padded tokens of a forward pass of the reference estimator, unless told otherwise."""

MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.25}
"""Of the memory that is free, what dense gradients may take while they are made. Packs on CUDA have had half of it."""

Advance = Callable[[int], None] | None
Mean = Literal["plain", "normalized"]
Gradients = dict[str, Tensor]
Halves = tuple[Gradients, Gradients]
"""Two parts that a mean gradient is the sum of: of every other prompt of a validation set, and of the others."""


def pieces(groups: Sequence[Group]) -> list[tuple[int, Sequence[Group]]]:
    """A set's groups in pieces, each with its half."""
    halves = [groups[half::2] for half in (0, 1)]
    return [(half, all_[at : at + PIECE]) for half, all_ in enumerate(halves) for at in range(0, len(all_), PIECE)]


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


class Piece(Protocol):
    """Some groups of a validation set, made ready, each with its weight in the set's mean."""

    def sums(self, names: Sequence[str], advance: Advance) -> tuple[Gradients, dict[str, Tensor]]:
        """Their gradients' sum for some parameters, float32 or wider; and of the linear layers among these the number
        of tokens and the sum of what they were given, (1 + I,) float64."""


class MeanGradients:
    """The mean gradients of validation sets, by halves, of whatever parameters are asked for.

    A set's gradients are summed from pieces that do not depend on the number of processes, each by one process, and the
    pieces in float64: of float32 numbers of like size that sum is exact, whatever its order. So another number of
    processes changes no direction, nor the input directions that a structured mask takes from it, which follow small
    changes far.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        make_piece: Callable[[Sequence[Group], int], Piece],
        validation: Mapping[str, Sequence[Group]],
        ranks: ProcessGroup,
        *,
        matrices: Collection[str] = (),
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
        advance: Advance = None,
    ) -> None:
        """`make_piece` of groups and the number of their set's. `matrices` are the linear layers' weights. `together`
        is entered by all processes around whatever passes each of them makes. SignalError for a set without a group."""
        self._parameters, self._matrices, self._ranks = parameters, matrices, ranks
        self._together, self._advance = together, advance
        self.mean_inputs: dict[str, Tensor] = {}
        """What each linear layer is given, by the name of its weight: means over tokens, added up over the sets."""
        for name, groups in validation.items():
            if not groups:
                raise SignalError("it has no group", where=f"validation set {name}", fix="give it prompts.")
        with together():
            self._own_V = [
                [(half, make_piece(piece, len(groups))) for half, piece in ranks.share(pieces(groups))]
                for groups in validation.values()
            ]

    @property
    def names(self) -> list[str]:
        """Of all parameters."""
        return list(self._parameters)

    def parts(self, room: int) -> list[list[str]]:
        """Names of the parameters, so many at a time as leave their dense gradients in so many bytes of memory."""
        # The directions of all sets, both halves of one in float64, and a piece.
        left = most = room // (4 * len(self._own_V) + 2 * 8 + 4)
        found: list[list[str]] = [[]]
        for name, parameter in self._parameters.items():
            if parameter.numel() > left and found[-1]:
                found.append([])
                left = most
            found[-1].append(name)
            left -= parameter.numel()
        return found

    def of(self, names: Sequence[str]) -> Iterator[Halves]:
        """Of each set in turn both halves' gradients; afterwards `mean_inputs` are those of these parameters."""
        self.mean_inputs = {}
        for own in self._own_V:
            yield self._halves(own, names)
        self._advance = None  # every group has been met

    def _halves(self, own: Sequence[tuple[int, Piece]], names: Sequence[str]) -> Halves:
        parameters = {name: self._parameters[name] for name in names}
        wide = [
            {name: torch.zeros(p.shape, dtype=torch.float64, device=p.device) for name, p in parameters.items()}
            for _ in (0, 1)
        ]
        inputs = {
            name: torch.zeros(1 + p.shape[1], dtype=torch.float64, device=p.device)
            for name, p in parameters.items()
            if name in self._matrices
        }
        with self._together():
            for half, piece in own:
                found, inputs_of = piece.sums(names, self._advance)
                for name, gradient in found.items():
                    wide[half][name] += gradient
                for name, sums_I in inputs_of.items():
                    inputs[name] += sums_I
                del found
        for sums in (*wide, inputs):
            self._ranks.add(sums)
        for name, sums_I in inputs.items():
            mean_I = (sums_I[1:] / sums_I[0].clamp(min=1)).float()
            self.mean_inputs[name] = self.mean_inputs.get(name, 0.0) + mean_I
        first, rest = ({name: half.pop(name).to(_wide(parameters[name])) for name in names} for half in wide)
        return first, rest


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def by_engine(engine: Engine, validation: Mapping[str, Sequence[Group]], mean: Mean, advance: Advance) -> MeanGradients:
    """Mean gradients from passes of the engine, the processes in lockstep. ValueError inside a `lockstep`: directions
    are made of sums over processes, and some of these may be doing something else there."""
    if engine.in_lockstep:
        raise ValueError("directions cannot be made inside lockstep()")

    def make_piece(groups: Sequence[Group], count: int) -> Piece:
        return _EnginePiece(engine, groups, count, mean)

    return MeanGradients(
        engine.parameters,
        make_piece,
        validation,
        engine.shards.ranks(),
        matrices=engine.matrices,
        together=engine.lockstep,
        advance=advance,
    )


class _EnginePiece:
    def __init__(self, engine: Engine, groups: Sequence[Group], count: int, mean: Mean) -> None:
        self._engine = engine
        settings, logs, norms_M = engine.settings, mean_log_ratios(engine, groups), np.ones(len(groups))
        if mean == "normalized":
            zero = torch.zeros((), device=engine.device)
            nothing = {name: zero.to(_wide(p)).expand(p.shape) for name, p in engine.parameters.items()}
            reader = ExactReader([nothing], len(groups), norms=True, repeated=engine.repeated)
            found = [segment_of(index, group, settings, None, logs[index]) for index, group in enumerate(groups)]
            engine.run([segment for segment in found if segment is not None], reader, divisible=False)
            norms_M = reader.squares_N.clamp(min=0).sqrt().numpy()
        weights = functional.mean_weights(norms_M, mean, count).tolist()
        found = [
            segment_of(index, group, settings, [weight] * len(group.completions), logs[index])
            for index, (group, weight) in enumerate(zip(groups, weights, strict=True))
        ]
        self._segments: list[Segment] = [segment for segment in found if segment is not None]

    def sums(self, names: Sequence[str], advance: Advance) -> tuple[Gradients, dict[str, Tensor]]:
        parameters = self._engine.parameters
        reader = DenseReader({name: parameters[name] for name in names}, self._engine.vocabulary)
        self._engine.run(self._segments, reader, after=by_group(advance))
        return reader.gradients, reader.inputs


def by_autograd(
    model: nn.Module,
    settings: SurrogateSettings,
    batch_tokens: int,
    validation: Mapping[str, Sequence[Group]],
    mean: Mean,
    advance: Advance,
) -> MeanGradients:
    """Mean gradients by the reference estimator."""

    def make_piece(groups: Sequence[Group], count: int) -> Piece:
        return _AutogradPiece(model, settings, batch_tokens, groups, count, mean)

    wide = {
        name: torch.zeros((), dtype=torch.float64, device=p.device).expand(p.shape)
        for name, p in trainable_parameters(model).items()
    }
    return MeanGradients(wide, make_piece, validation, process_group(), advance=advance)


class _AutogradPiece:
    def __init__(
        self,
        model: nn.Module,
        settings: SurrogateSettings,
        batch_tokens: int,
        groups: Sequence[Group],
        count: int,
        mean: Mean,
    ) -> None:
        self._model, self._settings, self._batch_tokens = model, settings, batch_tokens
        self._groups, self._count, self._mean = groups, count, mean

    def sums(self, names: Sequence[str], advance: Advance) -> tuple[Gradients, dict[str, Tensor]]:
        parameters = trainable_parameters(self._model)
        total = {name: torch.zeros_like(parameters[name], dtype=torch.float64) for name in names}
        for group in self._groups:
            if group.status != OK:
                continue
            found = prompt_gradient(self._model, group, self._settings, batch_tokens=self._batch_tokens).gradients
            weight = functional.mean_weights(np.array([norm(found)]), self._mean, self._count)[0]
            for name in names:
                total[name] += found[name] * weight
            if advance is not None:
                advance(1)
        return total, {}


def room_for_directions(engine: Engine) -> int:
    """Bytes that dense gradients may take, the same on all ranks."""
    room = int(free_bytes(engine.device) * MEMORY_SHARE.get(engine.device.type, 0.25))
    return min(engine.shards.ranks().gather(room))
