"""The loop of an online curriculum: choose, read, observe, and renew directions, with one state for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cropi.curriculum.curriculum import Choice, Curriculum
from cropi.gradients.reading import Reader
from cropi.training.curriculum_state import load_state, save_state
from cropi.training.group_evidence import GroupEvidence
from cropi.training.loss_normalizer import LossNormalizer
from cropi.training.online_sampler import OnlineSampler
from cropi.training.reward_log import RecordedReward
from cropi.training.row_matching import LossRow, loss_rows
from cropi.training.validation_pass import Due, SampledGroup, ValidationPass

# Samples the validation prompts that are due at a step, with the policy in training.
SampleDue = Callable[[Due, int], dict[str, list[SampledGroup]]]


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
    model: nn.Module  # unwrapped
    sample: SampleDue
    differentiate: Callable[[Mapping[str, Sequence[SampledGroup]], int], None]  # `validation.differentiate`, charged
    reader: Reader | None = None  # once there are directions
    batches: int = 0  # generation batches that were observed
    explained: list[list[Choice]] = field(default_factory=list)  # by generation batch; empty while only observing
    _rows: list[LossRow] = field(default_factory=list)
    _factor: float = 1.0

    # -- reading -------------------------------------------------------------------------------------------------------

    def micro_batch(self, inputs: Mapping[str, Tensor], accumulated: int, scale: float) -> AbstractContextManager[Any]:
        """The reader's context for forward and backward of a micro-batch; `scale` is that of mixed precision."""
        self._rows = loss_rows(inputs, self.evidence.pad_id)
        self._factor = self.normalizer.factor(inputs, accumulated)
        if self.reader is None:
            return nullcontext()
        return self.reader.reading(torch.arange(len(self._rows)), scale=scale)

    def end_micro_batch(self) -> None:
        """Take what was read. Masked rows have no gradient."""
        if self.reader is not None:
            self.evidence.add(self._rows, self._factor * self.reader.take())

    def end_generation_batch(self, step: int) -> None:
        """Tell the curriculum of every group, once all its completions have been differentiated."""
        judged = self.reward.latest
        assert judged is not None, "a generation batch is judged before it is trained on"
        outcomes = self.evidence.finish(judged)
        names = list(self.validation.sketches)
        for outcome in outcomes:
            influence = None
            if outcome.influence_VCH is not None:
                pairs = zip(names, outcome.influence_VCH, strict=True)
                influence = {name: halves_CH.tolist() for name, halves_CH in pairs}
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
        """Sample and differentiate the validation prompts that the curriculum asks for before a step."""
        count = self.curriculum.validation_due(step)
        if not count:
            return
        due = {name: [count] * len(prompts) for name, prompts in self.validation.sets.items()}
        groups = self.sample(due, step)
        self.differentiate(groups, step)
        self._turn()
        for name, own in groups.items():
            left_out = self.validation.sketches[name].leave_one_out()
            for group in own:
                values = left_out[group.member]
                mixed = len(set(group.rewards)) > 1 and bool(torch.isfinite(values).all())
                # the halves of the prompt's own completions are not told apart here
                influence = [(values / 2).tolist()] * 2 if mixed else None
                self.curriculum.observe_validation(name, group.member, group.rewards, step=step, influence=influence)

    def _turn(self) -> None:
        directions = self.validation.directions()
        if not directions:
            return
        if self.reader is None:
            self.reader = Reader(self.model, directions)
        else:
            self.reader.turn_to(directions)

    # -- state ---------------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger."""
        known = {name: value for name, value in self.curriculum.metrics().items() if abs(value) < float("inf")}
        return known | {"curriculum/rows_dropped": float(self.evidence.dropped)}

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint."""
        state = {
            "curriculum": self.curriculum.state_dict(),
            "directions": self.validation.state_dict(),
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
        self.validation.load_state_dict(self.model, state["directions"])
        self.explained = [[Choice(**choice) for choice in batch] for batch in state["explained"]]
        self.sampler.choices = state["choices"]
        self.batches, self.evidence.dropped = state["batches"], state["dropped"]
        self._turn()
