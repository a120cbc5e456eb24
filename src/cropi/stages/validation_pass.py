"""Directions of the validation sets: fresh completions of their prompts, and a backward pass over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cropi.functional.surrogate import group_advantages
from cropi.gradients.direction import DirectionSketch, backward_to_embeddings, deterministic, inner
from cropi.gradients.engine import free_bytes
from cropi.gradients.groups import SurrogateSettings
from cropi.gradients.training_influence import Direction, Reader
from cropi.parallel import process_group
from cropi.policy import completion_logprobs, longest_alike
from cropi.rollouts.generation import Sampling

RANK = 4
LOGITS_COPIES = 4  # of all logits that a pass holds at once
LEAST_COSINE = 0.1  # of a direction's halves
KEPT = 0.8  # weight of a round's gradients at the next round
Due = Mapping[str, Sequence[int]]  # completions that each prompt of a validation set wants
Member = tuple[str, int]  # a set and a place in it


@dataclass(frozen=True)
class ValidationPrompt:
    """A validation prompt: its row in the prompt table and its tokens."""

    row: Mapping[str, Any]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Answer:
    """A judged completion of a validation prompt; `mask` is 0 for tokens that a tool wrote."""

    prompt: Sequence[int]
    completion: Sequence[int]
    mask: Sequence[int]
    reward: float | None


# Samples and judges one completion of each member, with a seed. Collective.
Ask = Callable[[Sequence[Member], int], Sequence[Answer]]


@dataclass(frozen=True)
class SampledGroup:
    """Completions of a validation prompt and their rewards; those without a reward are left out."""

    member: int  # place in its set
    tokens: Sequence[int]
    completions: Sequence[Sequence[int]]
    rewards: Sequence[float]
    masks: Sequence[Sequence[int]] = ()  # of each completion: 1 for the policy's tokens, 0 for a tool's; empty: all 1

    @classmethod
    def of(cls, member: int, answers: Sequence[Answer]) -> SampledGroup:
        """The group of answers with rewards. What an environment wrote into only some prompts counts as a tool's."""
        beginnings = zip(*(answer.prompt for answer in answers), strict=False)
        common = [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, beginnings)]
        rests = [answer.prompt[len(common) :] for answer in answers]
        return cls(
            member,
            common,
            [[*rest, *answer.completion] for rest, answer in zip(rests, answers, strict=True)],
            [answer.reward for answer in answers if answer.reward is not None],
            [[0] * len(rest) + list(answer.mask) for rest, answer in zip(rests, answers, strict=True)],
        )


@dataclass(frozen=True)
class SetDirection:
    """Two directions of a validation set, from members with an even and with an odd place, and their length."""

    halves: Sequence[Direction]
    norm: float

    @classmethod
    def of(cls, halves: Sequence[Direction]) -> SetDirection | None:
        """None where a half is zero. Noise makes |D| too large: sqrt <D_0, D_1> is free of it.

        Where the halves hardly agree it would be near 0, and slopes huge: their cosine counts as `LEAST_COSINE`.
        """
        lengths = [inner(half, half) ** 0.5 for half in halves]
        if min(lengths) == 0:
            return None
        return cls(halves, max(inner(halves[0], halves[1]), LEAST_COSINE * lengths[0] * lengths[1]) ** 0.5)


@dataclass
class ValidationPass:
    """Samples validation prompts and keeps a sketch of each set's mean gradient, averaged over rounds."""

    sets: Mapping[str, Sequence[ValidationPrompt]]
    sampling: Sampling
    surrogate: SurrogateSettings  # normaliser and scaling of the trainer's loss
    batch_tokens: int
    seed: Callable[..., int]  # of the samples at an optimiser step and, but for the first, of a process
    sketches: dict[str, DirectionSketch] = field(default_factory=dict)
    directions: dict[str, SetDirection] = field(default_factory=dict)
    readable: Set[str] | None = None  # parameters that training's passes read; None before that is known

    def sample(self, ask: Ask, due: Due, step: int) -> dict[str, list[SampledGroup]]:
        """Ask for as many completions as each prompt wants. The ranks divide the prompts, and all return all groups."""
        ranks = process_group()
        members = [((name, member), count) for name in sorted(due) for member, count in enumerate(due[name])]
        wanted = [member for member, count in ranks.share(members) for _ in range(count)]
        answers = ask(wanted, self.seed(step, ranks.rank) if ranks.rank else self.seed(step))
        groups: dict[str, list[SampledGroup]] = {name: [] for name in sorted(due)}
        for (name, member), own in grouped(wanted, answers).items():
            groups[name].append(SampledGroup.of(member, own))
        return groups

    def differentiate(
        self, model: PreTrainedModel, groups: Mapping[str, Sequence[SampledGroup]]
    ) -> tuple[dict[str, dict[int, list[float]]], int, int]:
        """Renew the directions, and return what the members give to their own set, with the tokens computed and the
        multiply-adds of sketching and reading.

        A member gives two numbers, one for each half of its completions, against the half of the direction before this
        round that it had no part in. In a set's first round members give nothing: it would cost a second pass. Nor do
        groups of equal rewards, which have no gradient. No gradient buffer, optimiser state or random state is touched.
        The ranks divide the micro-batches, and all get the same directions and influence.
        """
        old, tokens, products, ranks = dict(self.directions), 0, 0, process_group()
        given: dict[str, dict[int, list[float]]] = {}
        with deterministic(model):
            for name, own in groups.items():
                sketch = self.sketches.setdefault(name, DirectionSketch(model, RANK))
                sketch.scale(KEPT if ranks.is_main else 0.0)
                given[name], computed, multiplied = self._pass(model, own, old.get(name), sketch)
                ranks.add(sketch.sums())
                tokens += computed
                products += multiplied
            self.renew()
        return given, tokens, products

    def _pass(
        self,
        model: PreTrainedModel,
        groups: Sequence[SampledGroup],
        direction: SetDirection | None,
        sketch: DirectionSketch,
    ) -> tuple[dict[int, list[float]], int, int]:
        """Differentiate groups of one set, reading against a direction and adding this rank's part to a sketch."""
        reader = None if direction is None else Reader(model, direction.halves)
        ranks, batches = process_group(), list(self._micro_batches(model, groups))
        tokens = sum(row.length for rows in batches for row in rows)
        while len(batches) % ranks.size:  # sharded weights are gathered for the passes of all ranks together
            batches.append([replace(row, weight=0.0) for row in batches[-1]])
        read = dict[int, list[list[float]]]()
        for number in ranks.share(range(len(batches))):
            rows = batches[number]
            with ExitStack() as stack:
                backward = stack.enter_context(backward_to_embeddings(model))
                stack.enter_context(sketch.sketching(torch.tensor([row.member % 2 for row in rows])))
                if reader is not None:
                    stack.enter_context(reader.reading(torch.arange(len(rows))))
                backward(self._loss(model, rows))
            if reader is not None:
                read[number] = reader.take()[1].tolist()
        found = dict[int, list[float]]()
        for number, values in sorted({key: own for part in ranks.gather(read) for key, own in part.items()}.items()):
            assert direction is not None
            for row, value in zip(batches[number], values, strict=False):
                found.setdefault(row.member, [0.0, 0.0])[row.half] += value[1 - row.member % 2] / direction.norm
        return found, tokens, tokens * (sketch.products + (0 if reader is None else reader.products))

    def renew(self) -> None:
        """Make the directions from the sketches, of the readable parameters."""
        self.directions = {}
        for name, sketch in self.sketches.items():
            halves = [
                {key: part for key, part in half.items() if self.readable is None or key in self.readable}
                for half in sketch.directions()
            ]
            direction = SetDirection.of(halves)
            if direction is not None:
                self.directions[name] = direction

    def state_dict(self) -> dict[str, Any]:
        """The sums of the sketches, each after the name of its set."""
        return {f"{name}/{key}": sums for name, sketch in self.sketches.items() for key, sums in sketch.sums().items()}

    def load_state_dict(self, model: PreTrainedModel, state: Mapping[str, Any]) -> None:
        """Go on from the sums of a checkpoint, tensors or arrays."""
        for name in dict.fromkeys(key.partition("/")[0] for key in state):
            self.sketches[name] = DirectionSketch(model, RANK)
            for key, sums in self.sketches[name].sums().items():
                sums.copy_(torch.as_tensor(state[f"{name}/{key}"]))
        self.renew()

    def _micro_batches(self, model: PreTrainedModel, groups: Sequence[SampledGroup]) -> Iterator[list[_Row]]:
        """Rows with a non-zero advantage, longest first, of at most `batch_tokens` padded tokens, for one pass each.

        Fewer where their logits in float32, with what softmax and its gradient make of them, would take more than a
        quarter of the free memory. Collective.
        """
        limit, vocabulary = longest_alike(model), model.config.get_text_config(decoder=True).vocab_size
        free = min(process_group().gather(free_bytes(model.device)))
        most = min(self.batch_tokens, free // 4 // (LOGITS_COPIES * 4 * vocabulary))
        rows = sorted((row for group in groups for row in self._rows(group)), key=lambda row: -row.length)
        while rows:
            count = max(1, most // rows[0].length) if rows[0].length <= limit else 1
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
            mask = group.masks[k] if group.masks else [1] * len(completion)
            by_length = self.surrogate.normalizer == "sequence"
            unit = sum(mask) if by_length else self.sampling.max_completion_length
            if any(mask) and advantages_K[k]:
                weight = float(advantages_K[k]) / (count * max(1, unit))
                yield _Row(group.member, place % 2, group.tokens, completion, mask, weight)

    def _loss(self, model: PreTrainedModel, rows: Sequence[_Row]) -> Tensor:
        logprobs_BT, _ = completion_logprobs(
            model,
            [row.prompt for row in rows],
            [row.completion for row in rows],
            temperature=self.sampling.temperature or 1.0,
        )
        weights_BT = logprobs_BT.new_zeros(logprobs_BT.shape)
        for weights_T, row in zip(weights_BT, rows, strict=True):
            weights_T[: len(row.mask)] = row.weight * weights_T.new_tensor(row.mask)
        return -(weights_BT * logprobs_BT).sum()


def grouped(members: Sequence[Member], answers: Sequence[Answer]) -> dict[Member, list[Answer]]:
    """The answers of all ranks that have a reward, by member and in their order. Collective."""
    pairs = [pair for part in process_group().gather(list(zip(members, answers, strict=True))) for pair in part]
    found: dict[Member, list[Answer]] = {member: [] for member, _ in sorted(pairs, key=lambda pair: pair[0])}
    for member, answer in pairs:
        if answer.reward is not None:
            found[member].append(answer)
    return {member: own for member, own in found.items() if own}


@dataclass(frozen=True)
class _Row:
    """A completion in the direction pass."""

    member: int
    half: int
    prompt: Sequence[int]
    completion: Sequence[int]
    mask: Sequence[int]
    weight: float  # advantage by the normaliser of its group

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion)
