"""Thompson sampling over sources of prompts, by the share of groups that are informative."""

from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float

from cropi.curriculum.chooser import Choice, ChoosesBatches, Pool, RewardChooser, rested
from cropi.curriculum.strategy import Need, StrategyTable

KEPT = 0.95  # d: of the counts, every step
REVERSION = 2.0  # kappa: groups that are added to every source every step, half of them informative
FLOOR = 0.05  # epsilon: share of the draws that is divided evenly


class ThompsonStrategy(ChoosesBatches, StrategyTable):
    """Random prompts of sources that are drawn by how often their groups have rewards that differ (marin).

    The sources are those of the prompts' column `source`; of one source alone all prompts are drawn alike.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"rewards"})

    type: Literal["thompson"]

    def chooser(self, pool: Pool) -> "Thompson":
        return Thompson(pool)


class Thompson(RewardChooser):
    """Draw sources b by w_b ~ Beta(1 + I_b, 1 + T_b - I_b), and a prompt of it evenly (marin, `thompson`, round 4).

    Every step: I <- d I + kappa / 2 + informative groups, T <- d T + kappa + groups. The pseudo-groups bring a source
    back that once gave nothing. One draw of the weights for a batch, normalised; none is below epsilon / sources.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.names, self._source_N = np.unique(np.array(pool.sources), return_inverse=True)
        self.informative_B, self.groups_B = np.zeros(len(self.names)), np.zeros(len(self.names))

    def choose(self, count: int, step: int, generator: np.random.Generator) -> list[Choice]:
        weights_B = generator.beta(1 + self.informative_B, 1 + self.groups_B - self.informative_B)
        weights_B = np.maximum(weights_B / weights_B.sum(), FLOOR / len(weights_B))
        free_N, chosen = rested(self.last_N, step, 0, count), list[Choice]()  # not again for a refilled batch
        for _ in range(count):
            left_B = np.bincount(self._source_N[free_N], minlength=len(weights_B)) > 0
            shares_B = np.where(left_B, weights_B, 0.0)
            source = int(generator.choice(len(shares_B), p=shares_B / shares_B.sum()))
            place = int(generator.choice(np.flatnonzero(free_N & (self._source_N == source))))
            chosen.append(Choice(place, "draw", ""))
            free_N[place] = False
        return chosen

    def begin_step(self) -> None:
        self.informative_B *= KEPT
        self.informative_B += REVERSION / 2
        self.groups_B *= KEPT
        self.groups_B += REVERSION

    def learn(self, place: int, rewards: Float[np.ndarray, " K"], step: int) -> None:
        source = self._source_N[place]
        self.informative_B[source] += float(rewards.max() > rewards.min())
        self.groups_B[source] += 1

    def beliefs(self) -> dict[str, np.ndarray]:
        return {"informative": self.informative_B, "groups": self.groups_B}

    def columns(self) -> dict[str, np.ndarray]:
        return {"informative": ((1 + self.informative_B) / (2 + self.groups_B))[self._source_N]}
