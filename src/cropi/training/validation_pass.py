"""Directions of the validation sets: fresh completions of their prompts, and one backward pass over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from cropi.functional.surrogate import group_advantages
from cropi.gradients.direction import Direction, DirectionSketch
from cropi.gradients.surrogate_weights import SurrogateSettings
from cropi.policy import Policy, completion_logprobs
from cropi.rewards.verdicts import Judge, answered
from cropi.rollouts.generation import Generator, Sampling

KEPT = 0.5  # weight of a round's gradients at the next round
Due = Mapping[str, Sequence[int]]  # completions that each prompt of a validation set wants


@dataclass(frozen=True)
class ValidationPrompt:
    """A validation prompt: its row in the prompt table and its tokens."""

    row: Mapping[str, Any]
    tokens: Sequence[int]


@dataclass(frozen=True)
class SampledGroup:
    """Completions of a validation prompt and their rewards; those without a reward are left out."""

    member: int  # place in its set
    tokens: Sequence[int]
    completions: Sequence[Sequence[int]]
    rewards: Sequence[float]


@dataclass
class ValidationPass:
    """Samples validation prompts and keeps a sketch of each set's mean gradient, averaged over rounds."""

    sets: Mapping[str, Sequence[ValidationPrompt]]
    judge: Judge
    sampling: Sampling
    surrogate: SurrogateSettings  # normaliser and scaling of the trainer's loss
    batch_tokens: int
    seed: Callable[[int], int]  # of the samples at an optimiser step
    sketches: dict[str, DirectionSketch] = field(default_factory=dict)

    def sample(self, policy: Policy, generate: Generator, due: Due, step: int) -> dict[str, list[SampledGroup]]:
        """Sample and judge as many completions as each prompt wants. The global random state is left alone."""
        wanted = [
            (name, member, prompt)
            for name in sorted(due)
            for member, (prompt, count) in enumerate(zip(self.sets[name], due[name], strict=True))
            for _ in range(count)
        ]
        completions = generate([prompt.tokens for *_, prompt in wanted], self.sampling, seed=self.seed(step))
        texts = policy.tokenizer.batch_decode(completions, skip_special_tokens=True)
        rows = [answered(text, prompt.row) for text, (*_, prompt) in zip(texts, wanted, strict=True)]
        found: dict[tuple[str, int], list[tuple[list[int], float]]] = {}
        for (name, member, _), ids, judgement in zip(wanted, completions, self.judge(rows), strict=True):
            if judgement.reward is not None:
                found.setdefault((name, member), []).append((ids, judgement.reward))
        groups: dict[str, list[SampledGroup]] = {name: [] for name in sorted(due)}
        for (name, member), pairs in found.items():
            own, rewards = [ids for ids, _ in pairs], [reward for _, reward in pairs]
            groups[name].append(SampledGroup(member, self.sets[name][member].tokens, own, rewards))
        return groups

    def differentiate(self, model: nn.Module, groups: Mapping[str, Sequence[SampledGroup]]) -> int:
        """Add the gradients of sampled groups to the sketches of their sets; returns the tokens that were computed.

        Groups of equal rewards have no gradient. No gradient buffer, optimiser state or random state is touched.
        """
        tokens = 0
        for name, own in groups.items():
            sketch = self.sketches.get(name)
            if sketch is None:
                sketch = self.sketches[name] = self._sketch(model, name)
            sketch.begin(members=len(self.sets[name]), keep=KEPT)
            for rows in self._micro_batches(own):
                tokens += self._add(model, sketch, rows)
        return tokens

    def directions(self) -> dict[str, Direction]:
        """The direction of every set that has been differentiated."""
        return {name: sketch.direction() for name, sketch in self.sketches.items()}

    def state_dict(self) -> dict[str, Any]:
        """The sketches."""
        return {name: sketch.state_dict() for name, sketch in self.sketches.items()}

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Go on from the sketches of a checkpoint."""
        for name, sketch_state in state.items():
            self.sketches[name] = self._sketch(model, name)
            self.sketches[name].load_state_dict(sketch_state)

    def _sketch(self, model: nn.Module, name: str) -> DirectionSketch:
        return DirectionSketch(model, seed=sorted(self.sets).index(name))

    def _micro_batches(self, groups: Sequence[SampledGroup]) -> Iterator[list[_Row]]:
        """Rows with a non-zero advantage, longest first, at most `batch_tokens` padded tokens together."""
        rows = sorted((row for group in groups for row in self._rows(group)), key=lambda row: -row.length)
        while rows:
            count = max(1, self.batch_tokens // rows[0].length)
            yield rows[:count]
            rows = rows[count:]

    def _rows(self, group: SampledGroup) -> Iterator[_Row]:
        """Rows of a group: halves alternate in order of reward, so that both have better and worse completions."""
        rewards, count = group.rewards, len(group.rewards)
        if len(set(rewards)) < 2:
            return
        advantages_K = group_advantages(np.array(rewards), std=self.surrogate.advantage_std)
        order = sorted(range(count), key=lambda k: (rewards[k], k))
        for place, k in enumerate(order):
            completion = group.completions[k]
            by_length = self.surrogate.normalizer == "sequence"
            unit = len(completion) if by_length else self.sampling.max_completion_length
            if completion and advantages_K[k]:
                weight = float(advantages_K[k]) / (count * max(1, unit))
                yield _Row(group.member, place % 2, group.tokens, completion, weight)

    def _add(self, model: nn.Module, sketch: DirectionSketch, rows: Sequence[_Row]) -> int:
        members, halves = [row.member for row in rows], [row.half for row in rows]
        with sketch.directing(members=members, halves=halves) as backward:
            logprobs_BT, _ = completion_logprobs(
                model,
                [row.prompt for row in rows],
                [row.completion for row in rows],
                temperature=self.sampling.temperature or 1.0,
            )
            weights_B = logprobs_BT.new_tensor([row.weight for row in rows])
            backward(-(weights_B[:, None] * logprobs_BT).sum())
        return sum(row.length for row in rows)


@dataclass(frozen=True)
class _Row:
    """A completion in the direction pass."""

    member: int
    half: int
    prompt: Sequence[int]
    completion: Sequence[int]
    weight: float  # advantage by the normaliser of its group

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion)
