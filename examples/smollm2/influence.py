"""Influence in the packed step of `grpo.py`: halves of a group as rows of their own, read and sketched by cropi.

A row of the packed step holds a whole group, and what flows through its prompt cannot be told apart by completion. The
curriculum wants two halves of each group, so each half takes a row: the prompt is computed twice instead of once, or
once for every completion as in TRL.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from grpo import Group, Policy, Question, Row, chunks, log_probs, pack
from torch import Tensor, nn

from cropi.curriculum.curriculum import Curriculum
from cropi.functional.surrogate import group_advantages
from cropi.gradients.direction import inner
from cropi.gradients.groups import SurrogateSettings
from cropi.gradients.layer_taps import matrix_parameters
from cropi.gradients.training_influence import Reader
from cropi.report.costs import DIRECTION
from cropi.rollouts.generation import Sampling
from cropi.seeds import derived_seed
from cropi.stages.online_loop import ENOUGH_READ
from cropi.stages.validation_pass import SampledGroup, SetDirection, ValidationPass, ValidationPrompt

SET = "two-step"  # the targeted validation set
TOKENS = 1024  # of a micro-batch, with padding
DIRECTIONS = 2  # halves of the validation set


@dataclass(frozen=True)
class Half(Row):
    """Half of a group; `member` is the group's place in its batch or validation set."""

    member: int
    half: int

    @property
    def length(self) -> int:
        """Tokens where every completion has a copy of its prompt, which are those that are charged."""
        return sum(len(self.prompt) + len(completion) for completion in self.completions)


def halves(
    member: int,
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
    rewards: Sequence[float],
    unit: float = 1.0,
) -> list[Half]:
    """Divide a group in order of its rewards, so that both halves have better and worse completions.

    Weights are advantages by `unit`.
    """
    order = sorted(range(len(rewards)), key=lambda k: (rewards[k], k))
    weights = group_advantages(np.array(rewards)) / unit
    return [
        Half(prompt, [completions[k] for k in own], [float(weights[k]) for k in own], member, half)
        for half, own in enumerate((order[::2], order[1::2]))
    ]


class PackedPass(ValidationPass):
    """cropi's pass over validation completions, with half a group a row instead of a completion."""

    bf16 = True

    def _micro_batches(self, model: Any, groups: Sequence[SampledGroup]) -> Iterator[list[Any]]:
        mixed = (group for group in groups if len(set(group.rewards)) > 1)
        longest = self.sampling.max_completion_length
        rows = [
            row for g in mixed for row in halves(g.member, g.tokens, g.completions, g.rewards, len(g.rewards) * longest)
        ]
        return chunks(rows, self.batch_tokens)

    def _loss(self, model: Any, rows: Sequence[Any]) -> Tensor:
        packed = pack(rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return -(packed.weights_T * log_probs(model, packed, by_row=True)).sum()


def read(policy: Policy, groups: Sequence[Group], reader: Reader, checked_in: nn.Module | None) -> dict[int, Any]:
    """Add the gradient of the loss to `.grad` as `Policy.accumulate` does, and read every group.

    Returns inner products of each group's surrogate: halves of the group x directions, 0 for equal rewards.
    """
    count = len(groups[0].completions)
    normaliser = len(groups) * count * policy.longest
    found = {n: np.zeros((2, DIRECTIONS)) for n in range(len(groups))}
    rows = [
        row
        for n, group in enumerate(groups)
        if group.is_mixed
        for row in halves(n, group.question.prompt, group.completions, group.rewards)
    ]
    for chunk in chunks(rows, TOKENS):
        with reader.reading(torch.arange(len(chunk)), checked_in):
            policy.backward(chunk, normaliser, by_row=True)
        for row, values in zip(chunk, reader.take()[1].double().numpy(), strict=True):
            found[row.member][row.half] = len(groups) * values
    return found


class Influence:
    """Directions of the targeted validation set and the reader of training's passes, as cropi's own loop keeps them."""

    def __init__(self, policy: Policy, validation: Sequence[Question], curriculum: Curriculum, seed: int) -> None:
        self.policy, self.curriculum, self.seed = policy, curriculum, seed
        self.questions = list(validation)
        self.validation = PackedPass(
            {SET: [ValidationPrompt({}, question.prompt) for question in validation]},
            sampling=Sampling(policy.longest, 1.0),
            surrogate=SurrogateSettings("constant", policy.longest),
            batch_tokens=TOKENS,
            seed=no_seed,
        )
        self.validation.bf16 = policy.bf16
        self.reader: Reader | None = None
        self.checked, self.share_read = False, float("nan")
        self.unread: list[str] = []  # parameters that the check left out
        self.parameters = matrix_parameters(policy.model)

    def renew(self, step: int) -> dict[str, Any] | None:
        """Sample and differentiate the validation prompts that are due before a step; a line for the log, or None."""
        due = self.curriculum.validation_due(step)
        if not due:
            return None
        groups = self._sample(due[SET], step)
        given, tokens, products = self.validation.differentiate(self.policy.model, {SET: groups})
        self._turn()
        for group in groups:
            own = given[SET].get(group.member)
            influence = None if own is None else [[half, half] for half in own]
            self.curriculum.observe_validation(SET, group.member, group.rewards, step=step, influence=influence)
        generated = sum(len(ids) for group in groups for ids in group.completions)
        prompts = sum(len(group.tokens) * len(group.completions) for group in groups)
        line = {
            "validation": step,
            "completions": sum(len(group.completions) for group in groups),
            "reward": round(float(np.mean([np.mean(group.rewards) for group in groups])), 4),
            "collect_tokens": generated,
            "score_tokens": tokens,
            "passes": {"collect": generated + prompts, "score": DIRECTION * tokens + products / self.parameters},
        }
        return line | agreement([sum(own) for own in given[SET].values()], self.validation.directions.get(SET))

    def _sample(self, counts: Sequence[int], step: int) -> list[SampledGroup]:
        asked = [(n, question) for n, question in enumerate(self.questions) for _ in range(counts[n])]
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "validation", step))
        own: dict[int, list[Group]] = {}
        drawn = self.policy.sample([question for _, question in asked], 1, generator=generator)
        for (n, _), group in zip(asked, drawn, strict=True):
            own.setdefault(n, []).append(group)
        return [
            SampledGroup(n, self.questions[n].prompt, [g.completions[0] for g in each], [g.rewards[0] for g in each])
            for n, each in own.items()
        ]

    def _turn(self) -> None:
        known = self.validation.directions.get(SET)
        self.reader = None if known is None or self.curriculum.rewards_only else Reader(self.policy.model, known.halves)

    def accumulate(self, groups: Sequence[Group]) -> tuple[dict[int, Any], float]:
        """Add the batch's gradient; returns influence by group, and what reading costs, in passes of a token."""
        reader = self.reader
        if reader is None:
            self.policy.accumulate(groups)
            return {}, 0.0
        found = read(self.policy, groups, reader, None if self.checked else self.policy.model)
        products = reader.products
        tokens = sum(len(g.question.prompt) + len(c) for g in groups for c in g.completions)
        if not self.checked and self._is_wrong(reader):
            found = {}
        known = self.validation.directions.get(SET)
        if not self.checked or known is None:
            found = {}
        return {n: values / known.norm for n, values in found.items()}, tokens * products / self.parameters

    def _is_wrong(self, reader: Reader) -> bool:
        """Compare what was read with whole gradients, once; whether what was read has to be forgotten."""
        wrong, share = reader.exclude_unfaithful()
        if np.isnan(share):  # no gradient yet
            return False
        self.checked, self.share_read, self.unread = True, share, wrong
        if share < ENOUGH_READ:
            self.curriculum.rewards_only = True
        self.validation.readable = reader.read_parameters
        self.validation.renew()
        self._turn()
        return bool(wrong) or self.reader is None

    def state(self) -> dict[str, Any]:
        """Sums of the sketches and what was checked, for `torch.save`."""
        readable = None if self.validation.readable is None else sorted(self.validation.readable)
        known = {"sketches": self.validation.state_dict(), "readable": readable, "checked": self.checked}
        return known | {"share_read": self.share_read, "rewards_only": self.curriculum.rewards_only}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""
        self.validation.readable = None if state["readable"] is None else set(state["readable"])
        self.validation.load_state_dict(self.policy.model, state["sketches"])
        self.checked, self.share_read = state["checked"], state["share_read"]
        self.curriculum.rewards_only = state["rewards_only"]
        self._turn()


def no_seed(*_: Any) -> int:
    raise AssertionError("completions are sampled and graded by the policy")


def agreement(influences: Sequence[float], direction: SetDirection | None) -> dict[str, float]:
    """Cosine of the direction's two halves; standard errors by which fresh members agree with the one before."""
    if direction is None:
        return {}
    found, (first, second) = dict[str, float](), direction.halves
    if len(influences) > 1 and (error := float(np.std(influences, ddof=1)) / len(influences) ** 0.5):
        found["agreement"] = round(float(np.mean(influences)) / error, 2)
    return found | {
        "cosine_of_halves": round(inner(first, second) / (inner(first, first) * inner(second, second)) ** 0.5, 3),
        "norm": direction.norm,
    }
