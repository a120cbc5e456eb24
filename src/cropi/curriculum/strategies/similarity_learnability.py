"""Similarity to the validation prompts times learnability from training rewards, batch by batch."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float

from cropi.curriculum.belief import kernel_features
from cropi.curriculum.chooser import Choice, ChoosesBatches, Pool, RewardChooser, State, below, in_proportion, rested
from cropi.curriculum.reward_belief import RewardBelief
from cropi.curriculum.strategy import Need, StrategyTable
from cropi.functional.points import nearest_cosines, principal_points, tfidf_points, tfidf_similarity
from cropi.prompt_text import words

COOLDOWN = 8  # steps before a prompt may be chosen again


class SimilarityLearnabilityStrategy(ChoosesBatches, StrategyTable):
    """Prompts like the validation prompts that the policy solves sometimes, chosen for each generation batch.

    A control of ours: what the validation prompts tell without a completion of them and without any gradient.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"validation", "rewards"})
    reads_texts: ClassVar[bool] = True

    type: Literal["similarity_learnability"]
    by: Literal["words", "hidden"] = "hidden"
    """Compare words (TF-IDF), or the base policy's mean last hidden states."""

    @property
    def reads_representations(self) -> bool:
        return self.by == "hidden"

    def chooser(self, pool: Pool) -> "SimilarityLearnability":
        """The chooser, with the similarities and the points that say which prompts are alike."""
        if self.by == "hidden":
            points = principal_points(pool.states_NE, *pool.validation_states.values())
            sizes = {name: len(own) for name, own in pool.validation_states.items()}
            nearest = {
                name: nearest_cosines(pool.states_NE, own).astype(np.float64)
                for name, own in pool.validation_states.items()
            }
        else:
            texts = [words(text) for text in pool.texts]
            of_sets = {name: [words(text) for text in own] for name, own in pool.validation_texts.items()}
            points = tfidf_points([*texts, *(text for own in of_sets.values() for text in own)])
            sizes = {name: len(own) for name, own in of_sets.items()}
            nearest = tfidf_similarity(texts, of_sets)
        return SimilarityLearnability(pool, nearest, sizes, kernel_features(points, len(pool)))


class SimilarityLearnability(RewardChooser):
    """s_i = max(0, cosine with the nearest validation prompt of the set - its mean over the pool) x E[p_i (1 - p_i)].

    p_i has a Beta posterior from training's own rewards, half of which is forgotten after 8 steps. Its prior counts two
    completions and has the mean that similar prompts have. Every place of a batch belongs to a set, drawn by E[p (1 -
    p)] of its prompts, which follows from the rewards of pool prompts like them. The largest s_i wins, among the
    prompts that were not drawn in the last 8 steps.
    """

    def __init__(
        self,
        pool: Pool,
        nearest: Mapping[str, Float[np.ndarray, " N"]],
        sizes: Mapping[str, int],
        features_PF: Float[np.ndarray, "P F"],
    ) -> None:
        """`features_PF` are of the pool, and then of the validation prompts, set by set with these `sizes`."""
        super().__init__(pool)
        self._likeness = {name: np.maximum(0.0, values_N - values_N.mean()) for name, values_N in nearest.items()}
        starts = len(pool) + np.cumsum([0, *sizes.values()])
        self._members = {name: slice(*starts[row : row + 2]) for row, name in enumerate(sizes)}
        self._rewards = RewardBelief(features_PF)

    def choose(self, count: int, step: int, generator: np.random.Generator) -> list[Choice]:
        self._rewards.age_to(step)
        variances_P = self._rewards.variances()
        variances_N = variances_P[: len(self.pool)]
        left = np.array([variances_P[self._members[name]].mean() for name in self._likeness])
        free_N = rested(self.last_N, step, COOLDOWN, count)
        names, chosen = list(self._likeness), list[Choice]()
        for _ in range(count):
            name = names[int(generator.choice(len(names), p=in_proportion(left)))]
            scores_N = np.where(free_N, self._likeness[name] * variances_N, -1.0)
            if scores_N.max() > 0:
                chosen.append(Choice(int(np.argmax(scores_N)), "mean", name))
            else:  # nothing that is left is like the set
                place = int(generator.choice(np.flatnonzero(free_N), p=in_proportion(variances_N[free_N])))
                chosen.append(Choice(place, "learnability", name))
            free_N[chosen[-1].place] = False
        return chosen

    def learn(self, place: int, rewards: Float[np.ndarray, " K"], step: int) -> None:
        self._rewards.observe(place, rewards, step)

    def beliefs(self) -> dict[str, np.ndarray]:
        return {}

    def columns(self) -> dict[str, np.ndarray]:
        likeness = {f"similarity/{name}": values_N for name, values_N in self._likeness.items()}
        return {"pass_rate": self._rewards.pass_rates()[: len(self.pool)]} | likeness

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        facts, _ = super().state()
        return facts, {f"rewards/{key}": values for key, values in self._rewards.state().items()}

    def restore(self, facts: Mapping[str, Any], arrays: State) -> None:
        super().restore(facts, arrays)
        self._rewards.restore(below(arrays, "rewards/"))
