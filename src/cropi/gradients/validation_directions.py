"""Validation directions: the mean gradients of validation sets, or of halves of a sample of the pool.

They do not depend on the number of processes. They are dense, and for a large policy larger than the policy itself, so
they can be computed for a part of the parameters at a time, with passes over the validation sets for each part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cropi.artifacts import OK
from cropi.console import warn_once
from cropi.curriculum.strategy import CANDIDATES
from cropi.errors import SignalError
from cropi.functional import influence_formulas
from cropi.functional.influence_formulas import halves
from cropi.functional.ranking import spearman_brown
from cropi.gradients.engine import Engine, by_group, free_bytes, segments_of
from cropi.gradients.exact import DenseReader, ExactReader, inner, norm
from cropi.gradients.groups import Group, SurrogateSettings, iterate_groups
from cropi.gradients.reference import prompt_gradient, trainable_parameters
from cropi.parallel import ProcessGroup, process_group
from cropi.seeds import unit_interval

PIECE = 16  # groups whose gradients one process sums together

REFERENCE_TOKENS = 8192  # default number of padded tokens in a forward pass of the reference estimator

MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.25}
"""Share of the free memory for dense gradients. On CUDA, packs already use half of the memory."""

Advance = Callable[[int], None] | None
Mean = Literal["plain", "normalized"]
Gradients = dict[str, Tensor]
Halves = tuple[Gradients, Gradients]
"""The two summands of a mean gradient: from every other prompt of a validation set, and from the rest."""


def pieces(groups: Sequence[Group]) -> list[tuple[int, Sequence[Group]]]:
    """Divide a set's groups into pieces, each with the number of its half."""
    halves = [groups[half::2] for half in (0, 1)]
    return [(half, all_[at : at + PIECE]) for half, all_ in enumerate(halves) for at in range(0, len(all_), PIECE)]


class Directions:
    """Inner products and reliability of V directions, added up over parts of the parameters."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, count = names, len(names)
        self.products_VV = np.zeros((count, count))  # inner products of the directions
        self._within_V3 = np.zeros((count, 3))

    def add(self, halves_V: Iterable[Halves]) -> list[Gradients]:
        """Add the halves' gradients of further parameters; return the directions' gradients of these parameters. Raises
        SignalError if one is not finite."""
        found = []
        for v, (first, rest) in enumerate(halves_V):
            self._within_V3[v] += inner(first, first), inner(rest, rest), inner(first, rest)
            while rest:  # freed one by one, before the next set is computed
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
        """Cosine between the halves, stepped up to the whole set (Spearman-Brown): the expected correlation with a
        direction from as many other prompts. NaN if a half is 0, as for a single prompt."""
        found = []
        for first, rest, between in self._within_V3:
            norms = first**0.5 * rest**0.5
            cosine = between / norms if norms else math.nan
            found.append(-math.inf if cosine <= -1 else spearman_brown(cosine))
        return np.array(found)


Piece = Callable[[Sequence[str], Advance], tuple[Gradients, dict[str, Tensor]]]
"""Sums the gradients of some groups of a validation set, each with its weight in the set's mean, for some parameters,
in float32 or wider. For linear layers it also gives the number of input tokens and their sum, (1 + I,) float64."""


class MeanGradients:
    """Compute the mean gradients of validation sets, by halves, for any subset of the parameters.

    One process sums a piece, and pieces do not depend on the number of processes. Pieces are summed in float64, which
    is exact for float32 numbers of similar size, in any order. So the number of processes changes no direction, nor
    the input directions of a structured mask, which are sensitive to small changes.
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
        """`make_piece` takes groups and the size of their set. `matrices` are the linear layers' weights. All processes
        enter `together` around their own passes."""
        self._parameters, self._matrices, self._ranks = parameters, matrices, ranks
        self._together, self._advance = together, advance
        self.mean_inputs: dict[str, Tensor] = {}
        """Mean input of each linear layer over tokens, summed over the sets; by the name of its weight."""
        with together():
            self._own_V = [
                [(half, make_piece(piece, len(groups))) for half, piece in ranks.share(pieces(groups))]
                for groups in validation.values()
            ]

    def parameter_chunks(self, room: float) -> list[list[str]]:
        """Divide the parameters so that the dense gradients of each part fit into `room` bytes."""
        # The directions of all sets, both halves of one set in float64, and one piece.
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
        """Yield both halves' gradients of each set; sets `mean_inputs` for these parameters."""
        self.mean_inputs = {}
        for own in self._own_V:
            yield self._halves(own, names)
        self._advance = None  # every group has been counted

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
                found, inputs_of = piece(names, self._advance)
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
    """Compute mean gradients with the engine, the processes in lockstep. Raises ValueError inside `lockstep`, because
    directions are sums over processes, which may be doing something else there."""
    if engine.in_lockstep:
        raise ValueError("directions cannot be made inside lockstep()")

    def make_piece(groups: Sequence[Group], count: int) -> Piece:
        norms_M = _norms(engine, groups) if mean == "normalized" else np.ones(len(groups))
        weights = influence_formulas.mean_weights(norms_M, mean, count).tolist()
        factors = [[weight] * len(group.completions) for group, weight in zip(groups, weights, strict=True)]
        segments = segments_of(groups, engine.settings, factors)

        def sums(names: Sequence[str], advance: Advance) -> tuple[Gradients, dict[str, Tensor]]:
            reader = DenseReader({name: engine.parameters[name] for name in names}, engine.vocabulary)
            engine.run(segments, reader, after=by_group(advance))
            return reader.gradients, reader.inputs

        return sums

    return MeanGradients(
        engine.parameters,
        make_piece,
        validation,
        engine.shards.ranks(),
        matrices=engine.matrices,
        together=engine.lockstep,
        advance=advance,
    )


def _norms(engine: Engine, groups: Sequence[Group]) -> Float[np.ndarray, " M"]:
    """Norm of each group's gradient."""
    zero = torch.zeros((), device=engine.device)
    nothing = {name: zero.to(_wide(p)).expand(p.shape) for name, p in engine.parameters.items()}
    reader = ExactReader([nothing], len(groups), norms=True, repeated=engine.repeated)
    engine.run(segments_of(groups, engine.settings), reader, divisible=False)
    return reader.squares_N.clamp(min=0).sqrt().numpy()


def by_autograd(
    model: nn.Module,
    settings: SurrogateSettings,
    batch_tokens: int,
    validation: Mapping[str, Sequence[Group]],
    mean: Mean,
    advance: Advance,
) -> MeanGradients:
    """Compute mean gradients by the reference estimator."""
    parameters = trainable_parameters(model)

    def make_piece(groups: Sequence[Group], count: int) -> Piece:
        def sums(names: Sequence[str], advance: Advance) -> tuple[Gradients, dict[str, Tensor]]:
            total = {name: torch.zeros_like(parameters[name], dtype=torch.float64) for name in names}
            for group in groups:
                if group.status != OK:
                    continue
                found = prompt_gradient(model, group, settings, batch_tokens=batch_tokens).gradients
                weight = influence_formulas.mean_weights(np.array([norm(found)]), mean, count)[0]
                for name in names:
                    total[name] += found[name] * weight
                if advance is not None:
                    advance(1)
            return total, {}

        return sums

    wide = {
        name: torch.zeros((), dtype=torch.float64, device=p.device).expand(p.shape) for name, p in parameters.items()
    }
    return MeanGradients(wide, make_piece, validation, process_group(), advance=advance)


def room_for_directions(engine: Engine) -> int:
    """Return the bytes available to dense gradients, the same in all processes."""
    room = int(free_bytes(engine.device) * MEMORY_SHARE.get(engine.device.type, 0.25))
    return min(engine.shards.ranks().gather(room))


# -- the groups that make a direction ------------------------------------------------------------------------------

MOST_PROMPTS = 100  # of a validation set, as in the code of the paper
NOISY = 0.2  # below this reliability of a validation direction a warning is given
FEW_GROUPS = 8  # below this many mixed validation groups a warning is given
ONE_SIDED = 0.9  # above this share of validation prompts that are always solved, or never, a warning is given


def validation_groups(trajectories: Mapping[str, pa.Table]) -> dict[str, list[Group]]:
    """Return the mixed groups of every validation set; others have a zero gradient. Raises SignalError without any."""
    names = sorted(name.removeprefix("validation/") for name in trajectories if name != "train")
    return {name: _mixed_groups(trajectories[f"validation/{name}"], name) for name in names}


def _mixed_groups(table: pa.Table, name: str) -> list[Group]:
    groups = dict(iterate_groups(table))
    # By hash, not by id: ids may start with the name of a source, and one source would be picked.
    chosen = sorted(sorted(groups, key=lambda i: unit_interval(0, "validation", i))[:MOST_PROMPTS])
    mixed = [group for i in chosen if (group := groups[i]) is not None and group.status == OK]
    if not mixed:
        raise SignalError(
            f"none of the {len(chosen)} prompts of this validation set has both better and worse completions, so it "
            "has no direction",
            where=f"prompts.validation.{name}",
            fix="use problems that the policy solves sometimes, or raise collect.validation_num_generations.",
        )
    if len(mixed) < FEW_GROUPS:
        warn_once(
            f"validation set {name}: only {len(mixed)} of {len(chosen)} prompts carry signal; influence will be noisy"
        )
    judged = one_sided([group for i in chosen if (group := groups[i]) is not None])
    if judged is not None:
        warn_once(f"validation set {name}: {judged}")
    return mixed


def one_sided(groups: Sequence[Group]) -> str | None:
    """Describe a validation set of which over 90 % are solved by every completion, or by none; else None.

    With graded rewards, a group of equal grades counts as solved at 1/2 and above.
    """
    alike = [group.pass_rate >= 0.5 for group in groups if group.variance == 0]
    always, never, total = alike.count(True), alike.count(False), len(groups)
    rest = f"only {total - always - never} give its direction"
    if always > 0 and always / total > ONE_SIDED:
        return (
            f"{always} of {total} prompts are solved by every completion: there is little left to gain, and {rest}; "
            "use harder problems"
        )
    if never > 0 and never / total > ONE_SIDED:
        return (
            f"{never} of {total} prompts are solved by no completion: {rest}; "
            "use easier problems, or raise collect.validation_num_generations"
        )
    return None


def warn_of_noise(reliability: Mapping[str, float]) -> None:
    """Warn of validation directions that are mostly noise."""
    for name, value in reliability.items():
        if value < NOISY:
            warn_once(
                f"validation set {name}: its direction is mostly noise (reliability {max(value, 0.0):.2f}, from two "
                "halves of its prompts), so its ranking is little better than chance. "
                "Use more prompts that the policy solves sometimes, or more completions for each"
            )


def candidate_groups(table: pa.Table, count: int, seed: int) -> dict[str, list[Group]]:
    """Draw `count` mixed groups of the training pool at random, in two halves. Raises SignalError below two."""
    mixed = {group.prompt_id: unit_interval(seed, "candidates", group.prompt_id) for group in _mixed(table)}
    if len(mixed) < 2:
        raise SignalError(
            f"{len(mixed)} training prompts have both better and worse completions, and at least two are needed",
            where="prompts.train",
            fix="use problems that the policy solves sometimes, or raise collect.num_generations.",
        )
    half_of = {i: name for name, half in zip(CANDIDATES, halves(mixed, count), strict=True) for i in half}
    found: dict[str, list[Group]] = {name: [] for name in CANDIDATES}
    for group in _mixed(table):
        if group.prompt_id in half_of:
            found[half_of[group.prompt_id]].append(group)
    return found


def _mixed(table: pa.Table) -> Iterator[Group]:
    return (group for _, group in iterate_groups(table) if group is not None and group.status == OK)
