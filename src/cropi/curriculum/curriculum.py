"""A curriculum that learns while it trains: it chooses prompts, and learns from what training does with them anyway."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from cropi.curriculum.belief import FORGOTTEN, Hyperparameters, InfluenceBelief, Posterior, kernel_features, likeness
from cropi.curriculum.chooser import Choice, Halves, PromptChooser, Source, State, below, in_proportion, rested
from cropi.curriculum.reward_belief import RewardBelief
from cropi.functional.intervals import ratio_interval

UNIFORM = 0.1  # share of the places that are drawn uniformly, so that it is known what choosing gains
DOUBTED = 0.5  # that share where chosen prompts help less; the others show when choosing helps again
GREEDY = 0.8  # of the other places: by the posterior mean; the rest by a joint draw
COOLDOWN = 3  # steps before a prompt may be chosen again: until its group has been observed
FIRST_ROUND = 8  # steps from the first fresh completions of validation prompts to the next
LATER = 1.5  # times as many to every next round, in multiples of the first, on which evaluations may fall
ROUND_STEPS = 2.0  # completions of a round, in those of a training step
REFIT = 4  # least steps between two choices of hyper-parameters; later a quarter of all steps so far
ENOUGH = 8  # groups of either kind before the gain of choosing is judged
GAIN_HALF_LIFE = 32.0  # steps
NEARLY_EQUAL = 0.05  # of the usual deviation of rewards in a group: divided by less, its noise would drown the others


@dataclass(frozen=True)
class _Plan:
    names: list[str]  # of the sets
    shares_V: Float[np.ndarray, " V"]  # of the places
    gains: dict[Source, Float[np.ndarray, "V N"]]
    doubted: bool  # whether chosen prompts have helped less than uniform ones

    def source(self, generator: np.random.Generator) -> Source:
        """Choose by likeness where no influence is known, else by the mean or by a draw."""
        if "likeness" in self.gains:
            return "likeness"
        return "mean" if generator.random() < GREEDY else "draw"


class Curriculum(PromptChooser):
    """Chooses prompts by drawn gain = learnability x influence per unit of learnability.

    Prompts that were drawn are not drawn again at once. Before influence is known, likeness to the validation prompts
    stands for it.
    """

    def __init__(
        self,
        points_NE: Float[np.ndarray, "N E"],
        validation: Mapping[str, Float[np.ndarray, "M E"]],
        *,
        seed: int,
        batch: int = 8,
        generations: int = 8,
        scaling: Literal["group", "none"] = "group",
        observe_only: bool = False,
        prompt_ids: Sequence[str] = (),
    ) -> None:
        """`points_NE` represents the pool's prompts, `validation` those of each set, in the same coordinates.

        A training step samples `batch` prompts, `generations` completions of each. `scaling` is that of the trainer's
        advantages: divided by the group's standard deviation, or not. With `observe_only` all prompts are drawn
        uniformly. A state is that of the same `prompt_ids`; unset, of exactly these points, which another machine may
        not compute to the bit.
        """
        self._pool, self._names = len(points_NE), sorted(validation)
        self._first = dict[str, int]()
        every = [points_NE]
        for name in self._names:
            self._first[name] = sum(map(len, every))
            every.append(validation[name])
        self._sizes = {name: len(validation[name]) for name in self._names}
        features_PF = kernel_features(np.concatenate(every), self._pool)
        self._rewards = RewardBelief(features_PF)
        self._likeness = {name: likeness(points_NE, validation[name]) for name in self._names}
        self._influence = {name: self._belief(features_PF, name) for name in self._names}
        self._scaling, self._observe_only = scaling, observe_only
        identity = "\n".join([*prompt_ids, repr(self._sizes)]).encode() if prompt_ids else features_PF.tobytes()
        super().__init__(self._pool, seed, hashlib.sha256(identity).hexdigest())
        self._generations, self._per_round = generations, round(ROUND_STEPS * batch * generations)
        self.rewards_only = False  # where too little of the gradient can be read
        self._fitted: dict[str, tuple[int, Hyperparameters]] = {}  # step and choice by set
        self._reliability: dict[str, float] = {}  # of each set's evidence, when that was chosen
        self._rounds: list[int] = []  # steps at which validation prompts were sampled
        self._dropped = 0  # observations that were not finite
        self._gains: list[tuple[int, bool, float]] = []  # step, uniform, gain

    def _belief(self, features_PF: Float[np.ndarray, "P F"], name: str) -> InfluenceBelief:
        start = self._first[name]
        own_MF = features_PF[start : start + self._sizes[name]]
        return InfluenceBelief(features_PF[: self._pool], own_MF, self._likeness[name])

    # Choosing

    def choose(self, count: int, step: int, generator: np.random.Generator) -> list[Choice]:
        self._age(step)
        free_N, chosen = rested(self.last_N, step, COOLDOWN, count), list[Choice]()
        plan = self._plan(step, generator)
        for _ in range(count):
            chosen.append(choice := self._one(free_N, plan, generator))
            free_N[choice.place] = False
        return chosen

    def _plan(self, step: int, generator: np.random.Generator) -> _Plan | None:
        """Gains by way of choosing and set, and the sets' shares of the places; None with `observe_only`.

        A place is for one set, drawn by the reward that its prompts miss. The gain on it is learnability x slope / (1 +
        recent groups of the prompt), since what was just trained gives less. The sum of gains over all sets would leave
        those to themselves on which all gains are small; so would places by learnability, which is least where all
        completions fail.
        """
        if self._observe_only:
            return None
        fresh_N = (self._learnability() / (1 + self._rewards.groups(self._generations)))[: self._pool]
        missing_P = self._rewards.missing()
        known = [(name, None if self.rewards_only else self._posterior(name, step)) for name in self._names]
        missing_V = np.array([missing_P[self._members(name)].mean() for name in self._names])
        ways: tuple[Source, ...] = ("mean", "draw") if any(found for _, found in known) else ("likeness",)
        slopes = {way: np.stack([self._slopes(*each, way, generator) for each in known]) for way in ways}
        gains = {source: fresh_N * slopes_VN for source, slopes_VN in slopes.items()}
        return _Plan(self._names, in_proportion(missing_V), gains, self._is_worse())

    def _slopes(
        self, name: str, found: Posterior | None, way: Source, generator: np.random.Generator
    ) -> Float[np.ndarray, " N"]:
        """Slopes on a set; where no influence is known, likeness to it."""
        if found is None:
            return self._likeness[name][: self._pool]
        return found.means() if way == "mean" else found.draw(generator)

    def _posterior(self, name: str, step: int) -> Posterior | None:
        """Belief about a set, with hyper-parameters that are chosen anew every few steps."""
        belief, (since, chosen) = self._influence[name], self._fitted.get(name, (0, None))
        if chosen is not None and step - since < max(REFIT, since // 4):
            return belief.posterior(chosen)
        found = belief.posterior()
        if found is not None:
            self._fitted[name], self._reliability[name] = (step, found.chosen), found.reliability
        return found

    def _one(self, free_N: Bool[np.ndarray, " N"], plan: _Plan | None, generator: np.random.Generator) -> Choice:
        """One place: uniform, or the prompt of the largest gain on a set."""
        uniform = generator.random() < (DOUBTED if plan is not None and plan.doubted else UNIFORM)
        if uniform or plan is None:
            return Choice(int(generator.choice(np.flatnonzero(free_N))), "uniform", "")
        row = int(generator.choice(len(plan.names), p=plan.shares_V))
        source = plan.source(generator)
        gains_N = np.where(free_N, plan.gains[source][row], -np.inf)
        if gains_N.max() > 0:
            return Choice(int(np.argmax(gains_N)), source, plan.names[row])
        # none is believed to help: of negative gains the largest would be that of a prompt which teaches nothing
        variances_N = self._rewards.variances()[: self._pool]
        place = generator.choice(np.flatnonzero(free_N), p=in_proportion(variances_N[free_N]))
        return Choice(int(place), "learnability", plan.names[row])

    def _learnability(self) -> Float[np.ndarray, " P"]:
        """Expected size of the advantages: the rewards' standard deviation, or variance if they are not divided."""
        return self._rewards.deviations(self._generations) if self._scaling == "group" else self._rewards.variances()

    def _members(self, name: str) -> Int[np.ndarray, " M"]:
        return np.arange(self._first[name], self._first[name] + self._sizes[name])

    # Learning

    def take(
        self, choice: Choice, rewards: Float[np.ndarray, " K"], step: int, influence: Mapping[str, Halves] | None
    ) -> None:
        """Learn from a group that was not taken before. Groups of equal rewards tell of rewards only."""
        self._age(step)
        self._rewards.observe(choice.place, rewards, step)
        if influence is None:
            return
        gain = 0.0
        for name, halves in influence.items():
            gain += self._told(self._influence[name], choice.place, rewards, halves, step)
        self._gains.append((step, choice.source == "uniform", gain))
        self._gains = [each for each in self._gains if step - each[0] < FORGOTTEN * GAIN_HALF_LIFE]

    def observe_validation(
        self, name: str, member: int, rewards: Sequence[float], *, step: int, influence: Halves | None = None
    ) -> None:
        """Take the fresh completions of a validation prompt: rewards, and influence without the prompt's own part."""
        self._age(step)
        known = np.asarray(rewards, dtype=float)
        self._rewards.observe(self._first[name] + member, known, step)
        if influence is not None:
            self._told(self._influence[name], self._pool + member, known, influence, step)

    def _told(
        self, belief: InfluenceBelief, point: int, rewards: Float[np.ndarray, " K"], halves: Halves, step: int
    ) -> float:
        """Turn a group's inner products into a slope with its error; returns its influence."""
        parts = np.asarray(halves, dtype=float)  # completions x direction
        influence = float(parts.sum(axis=0).mean())
        variance = float(rewards.var(ddof=1)) if len(rewards) > 1 else 0.0
        learnability = variance**0.5 if self._scaling == "group" else variance
        if variance**0.5 > NEARLY_EQUAL * self._rewards.usual_deviation():
            of_completions = (parts[0].mean() - parts[1].mean()) ** 2
            half_difference = float(parts[:, 0].sum() - parts[:, 1].sum()) / 2
            error = float(of_completions + half_difference**2) / learnability**2
            told = belief.observe(point, influence / learnability, error, step, half_difference / learnability)
            self._dropped += not told
        return influence if np.isfinite(influence) else 0.0

    def validation_due(self, step: int) -> dict[str, list[int]]:
        """Fresh completions that each validation prompt should get now; nothing if none. A round is named once.

        A round costs the same whatever there are of sets and prompts, and the steps between rounds become more:
        directions are needed most at the start, and turn slowly. Within a set, prompts get completions by the expected
        standard deviation of their rewards (Neyman 1934), an even number each; if there are too many prompts, some get
        none.
        """
        if self.rewards_only or (self._rounds and step - self._rounds[-1] < steps_to_next_round(len(self._rounds))):
            return {}
        generator = np.random.default_rng([self._seed, len(self._rounds), step])
        deviations_P = np.sqrt(self._rewards.variances())
        pairs = self._per_round // 2 // len(self._names)
        self._rounds.append(step)
        return {name: even_counts(deviations_P[self._members(name)], pairs, generator) for name in self._names}

    def _age(self, step: int) -> None:
        self._rewards.age_to(step)
        for belief in self._influence.values():
            belief.age_to(step)

    # What is known

    def gain(self) -> tuple[float, float, float] | None:
        """Help of a chosen group divided by that of a uniformly drawn one, with a 95 % interval (Fieller 1954).

        None before enough groups of both kinds. Groups of equal rewards help by 0. Older groups count less.
        """
        found = self._chosen_and_uniform()
        return None if found is None else ratio_interval(*found)

    def _chosen_and_uniform(self) -> tuple[float, float, float, float] | None:
        """Mean influence of chosen groups and its variance, then the same of uniform ones."""
        kinds = [[(step, gain) for step, uniform, gain in self._gains if uniform == kind] for kind in (False, True)]
        if min(map(len, kinds)) < ENOUGH:
            return None
        now, found = max(step for step, _, _ in self._gains), list[float]()
        for groups in kinds:
            steps, gains = (np.array(column) for column in zip(*groups, strict=True))
            weights = 2.0 ** (-(now - steps) / GAIN_HALF_LIFE)
            weights /= weights.sum()
            mean = float(weights @ gains)
            found += [mean, float(weights**2 @ (gains - mean) ** 2) * len(gains) / (len(gains) - 1)]
        return found[0], found[1], found[2], found[3]

    def _is_worse(self) -> bool:
        """Whether chosen groups help less than uniform ones, by more than chance. A ratio would fail below zero.

        Not wherever the interval of `gain` includes 1, as it often does: few groups are uniform.
        """
        found = self._chosen_and_uniform()
        if found is None:
            return False
        chosen, chosen_var, uniform, uniform_var = found
        return chosen - uniform + 1.96 * (chosen_var + uniform_var) ** 0.5 < 0

    def metrics(self) -> dict[str, float]:
        found = super().metrics() | {"curriculum/dropped": float(self._dropped)}
        ratio = self.gain()
        if ratio is not None:
            found |= {f"curriculum/gain{end}": value for end, value in zip(("", "_low", "_high"), ratio, strict=True)}
        for name, (_, chosen) in self._fitted.items():
            found[f"curriculum/{name}/correlation"] = chosen.correlation
            found[f"curriculum/{name}/own_share"] = chosen.own_share
            found[f"curriculum/{name}/reliability"] = self._reliability[name]
        return found

    def columns(self) -> dict[str, Any]:
        """Of every prompt: expected reward, P(its answer is wrong), influence with its standard error."""
        found = {
            "pass_rate": self._rewards.pass_rates()[: self._pool],
            "wrong_label": self._rewards.wrong_labels(self._pool),
        }
        learnability_N = self._learnability()[: self._pool]
        for name, belief in self._influence.items():
            posterior = belief.posterior()
            if posterior is not None:
                found[f"influence/{name}"] = learnability_N * posterior.means()
                found[f"standard_error/{name}"] = learnability_N * np.sqrt(posterior.variances())
        return found

    # State

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        facts = {
            "dropped": self._dropped,
            "fitted": {name: [since, asdict(chosen)] for name, (since, chosen) in self._fitted.items()},
            "reliability": self._reliability,
            "rounds": self._rounds,
            "gains": self._gains,
        }
        arrays = {f"rewards/{key}": values for key, values in self._rewards.state().items()}
        for name, belief in self._influence.items():
            arrays |= {f"influence/{name}/{key}": values for key, values in belief.state().items()}
        return facts, arrays

    def restore(self, facts: Mapping[str, Any], arrays: State) -> None:
        self._rounds, self._dropped, self._reliability = facts["rounds"], facts["dropped"], facts["reliability"]
        self._gains = [(step, uniform, gain) for step, uniform, gain in facts["gains"]]
        self._rewards.restore(below(arrays, "rewards/"))
        for name, belief in self._influence.items():
            belief.restore(below(arrays, f"influence/{name}/"))
        fitted = facts["fitted"].items()
        self._fitted = {name: (since, Hyperparameters(**chosen)) for name, (since, chosen) in fitted}


def steps_to_next_round(rounds: int) -> int:
    """Steps from the newest of so many rounds of validation completions to the next: 8, 16, 16, 24, 40, 64, ..."""
    return FIRST_ROUND * round(LATER ** (rounds - 1))


def even_counts(weights_M: Float[np.ndarray, " M"], pairs: int, generator: np.random.Generator) -> list[int]:
    """Even counts that sum to 2 `pairs` and are near to proportional to the weights, one pair each if they suffice."""
    if pairs <= len(weights_M):
        counts_M = np.zeros(len(weights_M), dtype=int)
        counts_M[generator.permutation(len(weights_M))[:pairs]] = 2
        return counts_M.tolist()
    spare_M = (pairs - len(weights_M)) * in_proportion(weights_M)
    counts_M = 1 + np.floor(spare_M).astype(int)
    left = pairs - int(counts_M.sum())
    counts_M[np.argsort(np.floor(spare_M) - spare_M, kind="stable")[:left]] += 1
    return (2 * counts_M).tolist()
