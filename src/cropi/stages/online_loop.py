"""The loop of an online curriculum: choose, read, observe, and renew directions, with one state for a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cropi.console import warn
from cropi.curriculum.curriculum import Choice, Curriculum
from cropi.gradients.reading import Reader
from cropi.stages.validation_pass import Due, SampledGroup, ValidationPass
from cropi.training.curriculum_state import load_state, save_state
from cropi.training.group_evidence import GroupEvidence
from cropi.training.loss_normalizer import LossNormalizer
from cropi.training.online_sampler import OnlineSampler
from cropi.training.reward_log import RecordedReward
from cropi.training.row_matching import LossRow, loss_rows

# Samples the validation prompts that are due at a step, with the policy in training.
SampleDue = Callable[[Due, int], dict[str, list[SampledGroup]]]
# Differentiates them at a step: by set and member, the influence of two halves of the completions.
Differentiate = Callable[[Mapping[str, Sequence[SampledGroup]], int], Mapping[str, Mapping[int, Sequence[float]]]]
ENOUGH_READ = 0.5  # share of the squared gradient below which influence does not stand for a prompt


@dataclass
class OnlineLoop:
    """Everything of a training that learns which prompts help. All processes hold the same state."""

    curriculum: Curriculum
    sampler: OnlineSampler
    reward: RecordedReward
    evidence: GroupEvidence
    normalizer: LossNormalizer
    validation: ValidationPass
    place_of: Mapping[str, int]  # of a prompt id in the pool
    model: PreTrainedModel  # unwrapped
    sample: SampleDue
    differentiate: Differentiate
    reader: Reader | None = None  # once there are directions
    checked: bool = False  # what is read against a whole gradient
    share_read: float = float("nan")  # of the squared gradient
    batches: int = 0  # generation batches that were observed
    explained: list[list[Choice]] = field(default_factory=list)  # by generation batch; empty while only observing
    _rows: list[LossRow] = field(default_factory=list)
    _factor: float = 1.0

    # -- reading -------------------------------------------------------------------------------------------------------

    def micro_batch(self, inputs: Mapping[str, Tensor], accumulated: int, scale: float) -> AbstractContextManager[Any]:
        """The reader's context for forward and backward of a micro-batch; `scale` is that of mixed precision."""
        self._rows = loss_rows(inputs, self.evidence.pad_id)
        self._factor = self.normalizer.factor(inputs, accumulated) / scale
        if self.reader is None:
            return nullcontext()
        return self.reader.reading(torch.arange(len(self._rows)), None if self.checked else self.model)

    def end_micro_batch(self) -> None:
        """Take what was read."""
        if self.reader is not None:
            places, values = self.reader.take()
            values_BD = torch.zeros(len(self._rows), values.shape[1]).index_add(0, places, values)
            self.evidence.add(self._rows, self._factor * values_BD.unflatten(1, (-1, 2)))

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
            self._choose_by_rewards()
            return
        before = list(self.validation.directions)
        self.validation.readable = reader.read_parameters
        self.validation.renew()
        self._turn()
        if wrong or before != list(self.validation.directions):
            self.evidence.forget()

    def _choose_by_rewards(self) -> None:
        self.curriculum.rewards_only = True
        self.reader = None
        self.evidence.forget()

    def end_generation_batch(self, step: int) -> None:
        """Tell the curriculum of every group, once all its completions have been differentiated. Collective."""
        if self.reader is not None and not self.checked:
            self._check(self.reader)
        judged = self.reward.latest
        assert judged is not None, "a generation batch is judged before it is trained on"
        outcomes = self.evidence.finish(judged)
        for outcome in outcomes:
            influence = None
            if outcome.influence_VCH is not None and self.checked:
                pairs = zip(self.validation.directions.items(), outcome.influence_VCH, strict=True)
                influence = {name: (halves_CH / known.norm).tolist() for (name, known), halves_CH in pairs}
            if outcome.rewards:
                self.curriculum.observe(
                    self._choice(outcome.prompt_id),
                    outcome.rewards,
                    step=step,
                    group=f"{self.batches}-{outcome.number}",
                    influence=influence,
                )
        self.batches += 1

    def _choice(self, prompt_id: str) -> Choice:
        place = self.place_of[prompt_id]
        batch = self.explained[self.batches] if self.explained else []
        return next((choice for choice in batch if choice.place == place), Choice(place, "uniform", ""))

    # -- directions ----------------------------------------------------------------------------------------------------

    def renew_directions(self, step: int) -> None:
        """Sample and differentiate the validation prompts that are due before a step; not within a generation batch."""
        count = self.curriculum.validation_due(step)
        if not count or self.evidence.is_begun:
            return
        due = {name: [count] * len(prompts) for name, prompts in self.validation.sets.items()}
        groups = self.sample(due, step)
        given = self.differentiate(groups, step)
        self._turn()
        for name, own in groups.items():
            for group in own:
                halves = given[name].get(group.member)
                influence = None if halves is None else [[half, half] for half in halves]
                self.curriculum.observe_validation(name, group.member, group.rewards, step=step, influence=influence)

    def _turn(self) -> None:
        known = [half for direction in self.validation.directions.values() for half in direction.halves]
        self.reader = Reader(self.model, known) if known else None

    # -- state ---------------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger."""
        known = {name: value for name, value in self.curriculum.metrics().items() if abs(value) < float("inf")}
        own = {"rows_dropped": float(self.evidence.dropped), "share_read": self.share_read}
        return known | {f"curriculum/{name}": value for name, value in own.items()}

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint."""
        state = {
            "curriculum": self.curriculum.state_dict(),
            "sketches": self.validation.state_dict(),
            "readable": None if self.validation.readable is None else sorted(self.validation.readable),
            "checked": self.checked,
            "share_read": self.share_read,
            "rewards_only": self.curriculum.rewards_only,
            "choices": self.sampler.choices,
            "batches": self.batches,
            "explained": [[asdict(choice) for choice in batch] for batch in self.explained],
            "dropped": self.evidence.dropped,
        }
        save_state(folder, state)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint. ArtifactError where its state is missing or damaged."""
        state = load_state(folder)
        self.curriculum.load_state_dict(state["curriculum"])
        self.validation.readable = None if state["readable"] is None else set(state["readable"])
        self.validation.load_state_dict(self.model, state["sketches"])
        self.checked, self.share_read = state["checked"], state["share_read"]
        self.explained = [[Choice(**choice) for choice in batch] for batch in state["explained"]]
        self.sampler.choices = state["choices"]
        self.batches, self.evidence.dropped = state["batches"], state["dropped"]
        self._turn()
        if state["rewards_only"]:
            self._choose_by_rewards()
