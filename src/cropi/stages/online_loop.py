"""The loops of a training whose batches are chosen: with and without influence. A checkpoint holds their state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cropi.artifacts import atomic_file, check_file, file_sha256, read_sealed, write_sealed
from cropi.console import warn, warn_once
from cropi.curriculum.chooser import Choice, GroupGate, Halves, PromptChooser
from cropi.curriculum.curriculum import Curriculum
from cropi.errors import ArtifactError
from cropi.gradients.layer_taps import matrix_parameters
from cropi.gradients.training_influence import Reader
from cropi.parallel import process_group
from cropi.stages.validation_pass import Due, SampledGroup, ValidationPass
from cropi.training.group_evidence import GroupEvidence, GroupOutcome, LossNormalizer, LossRow, loss_rows
from cropi.training.reward_log import Judged, RewardLog
from cropi.training.stage_sampler import OnlineSampler

# Samples the validation prompts that are due at a step, with the policy in training.
SampleDue = Callable[[Due, int], dict[str, list[SampledGroup]]]
# Differentiates them at a step: by set and member, the influence of two halves of the completions.
Differentiate = Callable[[Mapping[str, Sequence[SampledGroup]], int], Mapping[str, Mapping[int, Sequence[float]]]]
ENOUGH_READ = 0.5  # share of the squared gradient below which influence does not stand for a prompt


@dataclass(kw_only=True)
class ChooserLoop:
    """A training whose batches a chooser names: it is told of every group's rewards, and nothing else is read.

    All processes hold the same state.
    """

    chooser: PromptChooser
    sampler: OnlineSampler
    reward: RewardLog
    evidence: GroupEvidence
    place_of: Mapping[str, int]  # of a prompt id in the pool
    draws: bool = False  # whether the trainer draws, as often as it has to for a generation batch
    batches: int = 0  # generation batches that were observed
    reader: Reader | None = None  # of the first pass over a generation batch, once there are directions
    explained: list[list[Choice]] = field(default_factory=list)  # by choice; empty while only observing
    _observed: int = 0  # choices whose groups were observed
    _dropped: list[tuple[str, list[float]]] = field(default_factory=list)  # groups that are not trained on

    def micro_batch(self, inputs: Mapping[str, Tensor], accumulated: int, scale: float) -> AbstractContextManager[Any]:
        """Nothing: no pass is read."""
        return nullcontext()

    def end_micro_batch(self) -> None:
        """Nothing: no pass is read."""

    def read_passes(self) -> float:
        """Nothing: no pass is read."""
        return 0.0

    def renew_directions(self, step: int) -> None:
        """Nothing: there are none."""

    def end_stage(self, stage: int) -> None:
        """Nothing: what is believed of influence is kept, and here is none."""

    def kept_groups(self) -> list[int] | None:
        """Groups of the batch that was just sampled that are trained on; None for all."""
        if not isinstance(self.chooser, GroupGate):
            return None
        judged, size = self.reward.latest, self.evidence.generations
        assert judged is not None, "a generation batch is judged as it is sampled"
        groups = [(self.place_of[prompt_id], rewards) for prompt_id, rewards in judged.groups(size)]
        return self.chooser.kept(groups, self.batches)

    def drop_groups(self, judged: Judged) -> None:
        """Remember the groups that were sampled for a generation batch and are not in it."""
        self._dropped += judged.groups(self.evidence.generations)

    def end_generation_batch(self, step: int) -> None:
        """Tell the chooser of every group, once all its completions have been differentiated."""
        judged = self.reward.latest
        assert judged is not None, "a generation batch is judged before it is trained on"
        choice_of = self._choices()
        for outcome in self.evidence.finish(judged):
            if outcome.rewards:
                self.chooser.observe(
                    choice_of(outcome.prompt_id),
                    outcome.rewards,
                    step=step,
                    group=f"{self.batches}-{outcome.number}",
                    influence=self._influence(outcome),
                )
        for number, (prompt_id, rewards) in enumerate(self._dropped):
            if rewards:
                name = f"{self.batches}-dropped-{number}"
                self.chooser.observe(choice_of(prompt_id), rewards, step=step, group=name)
        self._dropped = []
        self.batches += 1

    def _influence(self, outcome: GroupOutcome) -> Mapping[str, Halves] | None:
        return None

    def _choices(self) -> Callable[[str], Choice]:
        """Return why a prompt is in the generation batch that ends; the loader has chosen later ones already."""
        end = len(self.explained) if self.draws else self._observed + 1
        start = max(0, self._observed - 1)  # a batch that a checkpoint interrupted is sampled and observed again
        of_place = {choice.place: choice for batch in self.explained[start:end] for choice in batch}
        self._observed = end

        def choice_of(prompt_id: str) -> Choice:
            place = self.place_of[prompt_id]
            return of_place.get(place, Choice(place, "uniform", ""))

        return choice_of

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger."""
        return {name: value for name, value in self.chooser.metrics().items() if abs(value) < float("inf")}

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint."""
        save_state(folder, self._state())

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint. ArtifactError where its state is missing or damaged."""
        self._restore(load_state(folder))

    def _state(self) -> dict[str, Any]:
        return {
            "curriculum": self.chooser.state_dict(),
            "choices": self.sampler.choices,
            "batches": self.batches,
            "observed": self._observed,
            "explained": [[asdict(choice) for choice in batch] for batch in self.explained],
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.chooser.load_state_dict(state["curriculum"])
        self.explained = [[Choice(**choice) for choice in batch] for batch in state["explained"]]
        self.sampler.choices = state["choices"]
        self.batches, self._observed = state["batches"], state["observed"]


@dataclass(kw_only=True)
class OnlineLoop(ChooserLoop):
    """A training that reads which prompts help."""

    chooser: Curriculum
    normalizer: LossNormalizer
    validation: ValidationPass
    model: PreTrainedModel  # unwrapped
    sample: SampleDue
    differentiate: Differentiate
    keep_beliefs: Callable[[int], None]  # of the stage that ends
    checked: bool = False  # what is read against a whole gradient
    share_read: float = float("nan")  # of the squared gradient
    _rows: list[LossRow] = field(default_factory=list)
    _factor: float = 1.0
    _products: int = 0  # multiply-adds of this process that have not been charged

    # -- reading -------------------------------------------------------------------------------------------------------

    def micro_batch(self, inputs: Mapping[str, Tensor], accumulated: int, scale: float) -> AbstractContextManager[Any]:
        """The reader's context for forward and backward of a micro-batch; `scale` is that of mixed precision."""
        self._rows = loss_rows(inputs, self.evidence.pad_id)
        self._factor = self.normalizer.factor(inputs, accumulated) / scale
        assert self.reader is not None, "no pass is read before there are directions"
        return self.reader.reading(torch.arange(len(self._rows)), None if self.checked else self.model)

    def end_micro_batch(self) -> None:
        """Take what was read."""
        assert self.reader is not None, "no pass is read before there are directions"
        self._products += self.reader.products * sum(len(row.prompt) + len(row.completion) for row in self._rows)
        places, values = self.reader.take()
        values_BD = torch.zeros(len(self._rows), values.shape[1]).index_add(0, places, values)
        self.evidence.add(self._rows, self._factor * values_BD.unflatten(1, (-1, 2)))

    def read_passes(self) -> float:
        """Return what reading has cost all processes since the last call, in forward passes of a token. Collective."""
        products, self._products = sum(process_group().gather(self._products)), 0
        return products / matrix_parameters(self.model)

    def _check(self, reader: Reader) -> None:
        """Leave out what is read wrongly; go on with rewards alone where too little is left."""
        wrong, share = reader.exclude_unfaithful()
        if math.isnan(share):  # no gradient yet
            return
        self.checked, self.share_read = True, share
        if share < ENOUGH_READ:
            warn(
                f"only {share:.0%} of the squared gradient can be read while training, so prompts are chosen by their "
                "rewards and not by influence"
            )
            self.choose_by_rewards()
            return
        before = list(self.validation.directions)
        self.validation.readable = reader.read_parameters
        self.validation.renew()
        self._turn()
        if wrong or before != list(self.validation.directions):
            self.evidence.forget()

    def choose_by_rewards(self) -> None:
        """Read no influence any more."""
        self.chooser.rewards_only = True
        self.reader = None
        self.evidence.forget()

    def end_generation_batch(self, step: int) -> None:
        """Check what was read, and tell the curriculum of every group. Collective."""
        if self.reader is not None and not self.checked:
            self._check(self.reader)
        super().end_generation_batch(step)

    def _influence(self, outcome: GroupOutcome) -> Mapping[str, Halves] | None:
        if outcome.influence_VCH is None or not self.checked:
            return None
        pairs = zip(self.validation.directions.items(), outcome.influence_VCH, strict=True)
        return {name: (halves_CH / known.norm).tolist() for (name, known), halves_CH in pairs}

    # -- directions ----------------------------------------------------------------------------------------------------

    def renew_directions(self, step: int) -> None:
        """Sample and differentiate the validation prompts that are due before a step; not within a generation batch."""
        due = {} if self.evidence.is_begun else self.chooser.validation_due(step)
        if not due:
            return
        groups = self.sample(due, step)
        if not any(groups.values()):
            warn_once("no completion of a validation prompt got a reward, so that influence is not known")
        given = self.differentiate(groups, step)
        self._turn()
        for name, own in groups.items():
            for group in own:
                halves = given[name].get(group.member)
                influence = None if halves is None else [[half, half] for half in halves]
                self.chooser.observe_validation(name, group.member, group.rewards, step=step, influence=influence)

    def end_stage(self, stage: int) -> None:
        """Keep what is believed. Collective."""
        self.keep_beliefs(stage)

    def _turn(self) -> None:
        known = [half for direction in self.validation.directions.values() for half in direction.halves]
        self.reader = Reader(self.model, known) if known else None

    # -- state ---------------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        own = {"rows_dropped": float(self.evidence.dropped)}
        own |= {"share_read": self.share_read} if self.checked else {}
        return super().metrics() | {f"curriculum/{name}": value for name, value in own.items()}

    def _state(self) -> dict[str, Any]:
        own = {
            "sketches": self.validation.state_dict(),
            "readable": None if self.validation.readable is None else sorted(self.validation.readable),
            "share_read": self.share_read if self.checked else None,
            "rewards_only": self.chooser.rewards_only,
            "dropped": self.evidence.dropped,
        }
        return super()._state() | own

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self.validation.readable = None if state["readable"] is None else set(state["readable"])
        self.validation.load_state_dict(self.model, state.get("sketches", {}))
        if state["share_read"] is not None:
            self.checked, self.share_read = True, state["share_read"]
        self.evidence.dropped = state["dropped"]
        self._turn()
        if state["rewards_only"]:
            self.choose_by_rewards()


# -- the state in a checkpoint -------------------------------------------------------------------------------------

ARRAYS, VALUES = "curriculum.npz", "curriculum.json"


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the arrays of the state's tables and then, with their checksum, all other parts, which are JSON values."""
    arrays, values = dict[str, np.ndarray](), dict[str, Any]()
    for part, own in state.items():
        if isinstance(own, Mapping):
            arrays |= {f"{part}/{k}": v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in own.items()}
        else:
            values[part] = own
    with atomic_file(folder / ARRAYS) as path, path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    write_sealed(folder / VALUES, values | {ARRAYS: file_sha256(folder / ARRAYS)})


def load_state(folder: Path) -> dict[str, Any]:
    """Read a state back. ArtifactError where it is missing or was changed: training cannot go on without it."""
    try:
        state = read_sealed(folder / VALUES)
        check_file(folder / ARRAYS, state.pop(ARRAYS))
    except ArtifactError as error:
        problem = error.what if Path(error.where).exists() else "is missing"
        raise ArtifactError(
            f"the curriculum's state {problem}, and without it training cannot go on",
            where=error.where,
            fix="put back a copy, or delete the checkpoint to go on from the one before it.",
        ) from None
    with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
        for name, array in arrays.items():
            part, _, own = name.partition("/")
            state.setdefault(part, {})[own] = array
    return state
