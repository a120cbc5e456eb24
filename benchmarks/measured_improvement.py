"""Does influence predict improvement? What a step along a gradient does to the validation objective, beside what scores
said it would do.

The objective of a validation set is the mean expected reward of its prompts, J(theta) = mean_m E_{x~pi_theta}[r_m(x)].
A score is judged by the change of J that follows when the policy steps along the gradient of the prompts it chose.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from shared_prefixes import SharedPrefixes
from torch import Tensor, nn

from cropi.artifacts import OK
from cropi.functional import influence_formulas as functional
from cropi.functional.agreement import spearman
from cropi.functional.bootstrap import Interval
from cropi.functional.surrogate import EPSILON, Normalizer
from cropi.gradients.engine import Engine, segment_of
from cropi.gradients.exact import DenseReader
from cropi.gradients.groups import Group
from cropi.gradients.surrogate_weights import SurrogateSettings

Direction = dict[str, Tensor]
"""A vector in the space of the trainable parameters, by parameter name."""


# Directions and steps


def inner(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """<first, second> over all parameters, summed in float64."""
    return float(sum(torch.dot(first[name].flatten(), second[name].flatten()).double() for name in first))


def mean_gradient(engine: Engine, groups: Sequence[Group], settings: SurrogateSettings) -> Direction:
    """Mean over prompts of the gradient of their surrogates at the current weights; a group without signal counts as 0.

    Raises ValueError without groups.
    """
    if not groups:
        raise ValueError("there is no mean over no groups")
    reader = DenseReader(engine.parameters, engine.vocabulary)
    weights = [[1 / len(groups)] * len(group.completions) for group in groups]
    found = [segment_of(n, group, settings, weights[n]) for n, group in enumerate(groups)]
    engine.run([segment for segment in found if segment is not None], reader)
    return reader.gradients


def reward_gradient(engine: Engine, groups: Sequence[Group]) -> Direction:
    """Unbiased estimate of grad J from on-policy groups: (1/M) sum_m 1/(K - 1) sum_k (r_k - mean r) grad log pi(x_k).

    REINFORCE with the mean reward of the other K - 1 as baseline (Kool et al. 2019), in units of reward: the surrogate
    with Z = K and no division by the deviation, times K / (K - 1). Raises ValueError where K differs between groups.
    """
    counts = {len(group.completions) for group in groups}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(f"all groups need the same number of completions, at least 2; got {sorted(counts)}")
    settings = replace(engine.settings, normalizer="constant", max_completion_length=1, advantage_std=False)
    factor = min(counts) / (min(counts) - 1)
    return {name: gradient * factor for name, gradient in mean_gradient(engine, groups, settings).items()}


def second_moment(gradients: Sequence[Mapping[str, Tensor]]) -> Direction:
    """Mean of the squares, coordinate by coordinate: what Adam's v estimates when these are its batches."""
    return {name: torch.stack([g[name] for g in gradients]).square().mean(dim=0) for name in gradients[0]}


def preconditioner(moment: Mapping[str, Tensor], eps: float = 1e-8) -> Direction:
    """The diagonal P = 1 / (sqrt(v) + eps) that Adam multiplies gradients by; 0 where v is 0, for want of data."""
    return {name: torch.where(v > 0, 1 / (v.sqrt() + eps), torch.zeros_like(v)) for name, v in moment.items()}


def preconditioned(direction: Mapping[str, Tensor], diagonal: Mapping[str, Tensor]) -> Direction:
    """P d."""
    return {name: direction[name] * diagonal[name] for name in direction}


def adam_update(
    gradient: Mapping[str, Tensor], moment: Mapping[str, Tensor], *, beta2: float = 0.999, eps: float = 1e-8
) -> Direction:
    """What one gradient adds to an Adam-trained policy, per unit of learning rate, over all steps it is remembered in:

    g / (sqrt(beta2 v + (1 - beta2) g^2) + eps). Momentum spreads this over steps without changing its sum, so it is the
    step of Kingma and Ba (2015) with beta1 = 0; v is the second moment before the step, its bias corrected.
    """
    return {name: g / ((beta2 * moment[name] + (1 - beta2) * g.square()).sqrt() + eps) for name, g in gradient.items()}


@contextmanager
def moved(parameters: Mapping[str, nn.Parameter], update: Mapping[str, Tensor], step: float) -> Iterator[None]:
    """Inside, parameters are theta + step * update; afterwards theta again, bit for bit."""
    saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(update[name].to(parameter.dtype), alpha=step)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])


# The measured change


@dataclass(frozen=True)
class Change:
    """The change of the objective of each validation set."""

    values_V: Float[np.ndarray, " V"]
    errors_V: Float[np.ndarray, " V"]
    """Standard errors from the samples of each prompt; the prompts are taken as given."""
    effective_share: float
    """(sum w)^2 / (n sum w^2) of the samples' weights: 1 for no step, near 0 where the change means nothing."""


@dataclass(frozen=True)
class _Prompt:
    """A prompt with its distinct completions, how often each was drawn, and its reward against the others' mean."""

    set: int
    prompt_ids: list[int]
    completions: list[list[int]]
    counts_R: Float[np.ndarray, " R"]
    advantages_R: Float[np.ndarray, " R"]


class Objective:
    """The objective of validation sets, held by completions drawn at theta from the policy itself.

    At other weights theta' its change is estimated by importance weights of whole completions,
    J(theta') - J(theta) = mean_m (1/S) sum_s (w_s - 1) (r_s - mean of the other rewards),
    w_s = pi_theta'(x_s) / pi_theta(x_s):
    unbiased at any distance, with far less noise than two independent samples as long as `effective_share` is high. The
    samples are the same for every theta', so comparisons share what noise there is. Its slope at theta along u is
    <u, `reward_gradient` of the same groups>.
    """

    def __init__(
        self,
        model: nn.Module,
        sets: Mapping[str, Sequence[Group]],
        *,
        temperature: float = 1.0,
        batch_tokens: int = 4096,
    ) -> None:
        """`sets`: on-policy groups of each validation set. Those with equal rewards add 0 and are not computed."""
        self.names = list(sets)
        self._counts_V = np.array([len(groups) for groups in sets.values()])
        self._prompts = [_distinct(v, g) for v, groups in enumerate(sets.values()) for g in groups if g.status == OK]
        self._log_probs = SharedPrefixes(
            model,
            [(prompt.prompt_ids, prompt.completions) for prompt in self._prompts],
            temperature=temperature,
            batch_tokens=batch_tokens,
        )
        self._start = self._log_probs()

    def change(self) -> Change:
        """J at the model's current weights minus J at the weights that the objective was made with."""
        values_V, variances_V = np.zeros(len(self.names)), np.zeros(len(self.names))
        first = second = 0.0
        for prompt, now, start in zip(self._prompts, self._log_probs(), self._start, strict=True):
            weights_R, counts_R = np.exp(np.array(now) - np.array(start)), prompt.counts_R
            gains_R, total = prompt.advantages_R * (weights_R - 1), prompt.counts_R.sum()
            mean = float(counts_R @ gains_R) / total
            spread = float(counts_R @ (gains_R - mean) ** 2) / (total - 1)
            values_V[prompt.set] += mean / self._counts_V[prompt.set]
            variances_V[prompt.set] += spread / total / self._counts_V[prompt.set] ** 2
            first, second = first + counts_R @ weights_R, second + counts_R @ weights_R**2
        samples = sum(prompt.counts_R.sum() for prompt in self._prompts)
        return Change(values_V, np.sqrt(variances_V), float(first**2 / (samples * second)) if samples else 1.0)


def _distinct(v: int, group: Group) -> _Prompt:
    total, mean = len(group.rewards), group.pass_rate
    equal = Counter((tuple(c), r) for c, r in zip(group.completions, group.rewards, strict=True))
    distinct = sorted(equal)
    advantages_R = np.array([reward - mean for _, reward in distinct]) * total / (total - 1)
    counts_R = np.array([float(equal[key]) for key in distinct])
    return _Prompt(v, group.prompt_ids, [list(completion) for completion, _ in distinct], counts_R, advantages_R)


# Scores

Score = Literal["dot", "cosine", "gain", "norm"]


@dataclass(frozen=True)
class Kind:
    """One way of scoring a prompt from its stored trajectories."""

    normalizer: Normalizer
    advantage_std: bool
    """Of the training prompts' advantages."""
    validation_std: bool
    score: Score
    """`gain`: cosine x standard deviation of the rewards of the stored trajectories."""
    preconditioned: bool
    """With Adam's P: <g, P d>, and lengths sqrt(<g, P g>)."""

    @property
    def name(self) -> str:
        """Parts joined by spaces."""
        std = ("std" if self.advantage_std else "no std") + (
            "" if self.advantage_std == self.validation_std else "/other"
        )
        return f"{self.normalizer} {std} {self.score}" + (" adam" if self.preconditioned else "")


def kinds() -> list[Kind]:
    """All ways with the same settings on both sides, and the one that predicts the mean reward's gain from a step of a
    trainer that divides advantages by their deviation: that division on the training side only."""
    normalizers: tuple[Normalizer, ...] = ("sequence", "token", "constant")
    scores: tuple[Score, ...] = ("dot", "cosine", "gain", "norm")
    both = (False, True)
    found = [Kind(z, std, std, s, adam) for z, std, s, adam in product(normalizers, both, scores, both)]
    return found + [Kind("constant", True, False, "dot", adam) for adam in (False, True)]


class PromptScores:
    """Scores of prompts by any `Kind`, from one gradient of each prompt and normaliser that needs its own.

    The deviation of a prompt's rewards and the divisor of `token` and `constant` are numbers of the prompt, so all
    kinds come from the gradients under `sequence` and `constant` without division by the deviation.
    """

    def __init__(
        self,
        engine: Engine,
        train: Sequence[Group],
        validation: Mapping[str, Sequence[Group]],
        settings: SurrogateSettings,
        diagonal: Mapping[str, Tensor],
    ) -> None:
        """`diagonal`: Adam's P. Of `settings`, normaliser and deviation are set by each kind."""
        self._groups, self._settings, self._sets = train, settings, len(validation)
        ways: list[tuple[Normalizer, bool]] = [
            (normalizer, std) for normalizer in ("sequence", "token", "constant") for std in (True, False)
        ]
        self.directions = {
            way: [
                mean_gradient(engine, groups, replace(settings, normalizer=way[0], advantage_std=way[1]))
                for groups in validation.values()
            ]
            for way in ways
        }
        self._variances_N = np.array([group.variance for group in train])
        # products[base][n]: with every direction, plain then preconditioned, then both squared lengths
        self._products = {base: self._meet(engine, base, diagonal) for base in ("sequence", "constant")}
        self._lengths_V = {
            (way, adam): np.array([_length(d, diagonal if adam else None) for d in self.directions[way]])
            for way in ways
            for adam in (False, True)
        }

    def values(self, kind: Kind) -> Float[np.ndarray, "N V"]:
        """Scores; 0 where a group has no signal. `norm` does not depend on the validation set."""
        found = self._products["sequence" if kind.normalizer == "sequence" else "constant"]
        lengths_N1 = np.sqrt(found["squares"][int(kind.preconditioned)])[:, None]
        scales_N1 = self._scales(kind)[:, None]
        if kind.score == "norm":
            return np.repeat(lengths_N1 * scales_N1, self._sets, axis=1)
        products_NV = found[(kind.normalizer, kind.validation_std)][int(kind.preconditioned)]
        if kind.score == "dot":
            return products_NV * scales_N1
        lengths_NV = lengths_N1 * self._lengths_V[((kind.normalizer, kind.validation_std), kind.preconditioned)]
        cosines_NV = np.divide(products_NV, lengths_NV, out=np.zeros_like(products_NV), where=lengths_NV > 0)
        return functional.gain(cosines_NV, self._variances_N) if kind.score == "gain" else cosines_NV

    def learnability(self) -> Float[np.ndarray, " N"]:
        """Variance of the rewards."""
        return self._variances_N

    def _scales(self, kind: Kind) -> Float[np.ndarray, " N"]:
        """What multiplies the gradient without deviation under the base normaliser; 0 without signal."""
        scales = np.zeros(len(self._groups))
        for n, group in enumerate(self._groups):
            if group.status == OK:
                deviation = float(np.std(group.rewards, ddof=1)) + EPSILON if kind.advantage_std else 1.0
                most = len(group.completions) * self._settings.max_completion_length
                scales[n] = (most / group.completion_tokens if kind.normalizer == "token" else 1.0) / deviation
        return scales

    def _meet(self, engine: Engine, base: Normalizer, diagonal: Mapping[str, Tensor]) -> dict[object, np.ndarray]:
        ways = [way for way in self.directions if (way[0] == "sequence") == (base == "sequence")]
        settings = replace(self._settings, normalizer=base, advantage_std=False)
        stacked = {
            name: torch.stack([d[name].flatten() for w in ways for d in self.directions[w]]) for name in diagonal
        }
        found_N2D = np.zeros((len(self._groups), 2, len(ways) * self._sets))
        squares_2N = np.zeros((2, len(self._groups)))
        for n, group in enumerate(self._groups):
            if group.status != OK:
                continue
            gradient = mean_gradient(engine, [group], settings)
            for adam, vector in enumerate([gradient, preconditioned(gradient, diagonal)]):
                parts_KD = torch.stack([(stacked[name] @ vector[name].flatten()).double() for name in stacked])
                found_N2D[n, adam] = parts_KD.sum(dim=0).numpy()
                squares_2N[adam, n] = inner(gradient, vector)
        parts: dict[object, np.ndarray] = {"squares": squares_2N}
        for number, way in enumerate(ways):
            columns = slice(number * self._sets, (number + 1) * self._sets)
            parts[way] = found_N2D[:, :, columns].transpose(1, 0, 2)
        return parts


def _length(direction: Direction, diagonal: Mapping[str, Tensor] | None) -> float:
    other = direction if diagonal is None else preconditioned(direction, diagonal)
    return math.sqrt(max(0.0, inner(direction, other)))


# Agreement of scores with what was measured

Pair = tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]
"""Of the subsets of one experiment: what was predicted, and what was measured."""


def over_subsets(
    statistic: Callable[[Sequence[Int[np.ndarray, " S"]]], float], counts: Sequence[int], *, times: int, seed: int
) -> Interval:
    """A statistic of experiments with so many subsets, and its 95 % percentile bootstrap interval over subsets.

    The statistic takes the rows to use of each experiment. The same seed redraws the same rows, so that differences of
    two scores may be taken inside the statistic. Draws that give NaN do not count; NaN bounds where all do.
    """
    generator = np.random.default_rng(seed)
    value = statistic([np.arange(count) for count in counts])
    found_R = np.array([statistic([generator.integers(n, size=n) for n in counts]) for _ in range(times)])
    if np.isnan(found_R).all():
        return Interval(value, math.nan, math.nan)
    low, high = np.nanquantile(found_R, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def rank_agreement(pairs: Sequence[Pair], *, times: int = 1000, seed: int = 0) -> Interval:
    """Spearman's correlation of predicted and measured over subsets, the mean over experiments."""

    def agreement(rows: Sequence[Int[np.ndarray, " S"]]) -> float:
        return float(np.mean([spearman(a[r], b[r]) for (a, b), r in zip(pairs, rows, strict=True)]))

    return over_subsets(agreement, [len(a) for a, _ in pairs], times=times, seed=seed)


def slope(pairs: Sequence[Pair], *, times: int = 1000, seed: int = 0) -> Interval:
    """Least-squares slope of measured on predicted, with an intercept for each experiment: 1 for right predictions.

    Noise of the predictions themselves pulls it towards 0.
    """

    def fitted(rows: Sequence[Int[np.ndarray, " S"]]) -> float:
        centred = [(a[r] - a[r].mean(), b[r]) for (a, b), r in zip(pairs, rows, strict=True)]
        square = sum(float(a_S @ a_S) for a_S, _ in centred)
        return sum(float(a_S @ b_S) for a_S, b_S in centred) / square if square else math.nan

    return over_subsets(fitted, [len(a) for a, _ in pairs], times=times, seed=seed)
