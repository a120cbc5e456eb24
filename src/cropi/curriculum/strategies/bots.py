"""BOTS: Beta posteriors that fall back to the prior step by step, and Thompson sampling."""

from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from cropi.curriculum.chooser import Choice, ChoosesBatches, Pool, RewardChooser
from cropi.curriculum.strategy import Need, StrategyTable

TARGET = 0.5  # p* (released example)


class BotsStrategy(ChoosesBatches, StrategyTable):
    """The prompts whose pass rate, drawn from a posterior that forgets every step, is nearest to 1/2 (BOTS).

    Without the pass rates of two reference models that BOTS can read as well (its rho is 0): they cost completions of
    the whole pool.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"rewards"})

    type: Literal["bots"]
    forgotten: Annotated[float, Field(ge=0, le=1)] = 0.1
    """lambda: share of the evidence of every prompt that a step forgets (released example: 0.1)."""

    def chooser(self, pool: Pool) -> "Bots":
        return Bots(pool, self.forgotten)


class Bots(RewardChooser):
    """Choose the smallest |q_i - p*| with q_i ~ Beta(a_i, b_i) over the whole pool (BOTS, arXiv 2510.26374).

    Once a step, for all prompts: a <- (1 - lambda) a + lambda + r, b <- (1 - lambda) b + lambda + n - r, with n rewards
    of sum r, none for prompts that were not trained on.
    """

    def __init__(self, pool: Pool, forgotten: float) -> None:
        super().__init__(pool)
        self._forgotten = forgotten
        self.a_N, self.b_N = np.ones(len(pool)), np.ones(len(pool))

    def choose(self, count: int, step: int, generator: np.random.Generator) -> list[Choice]:
        distances_N = np.abs(generator.beta(self.a_N, self.b_N) - TARGET)
        return [Choice(int(place), "draw", "") for place in np.argsort(distances_N, kind="stable")[:count]]

    def begin_step(self) -> None:
        for evidence_N in (self.a_N, self.b_N):
            evidence_N *= 1 - self._forgotten
            evidence_N += self._forgotten

    def learn(self, place: int, rewards: Float[np.ndarray, " K"], step: int) -> None:
        self.a_N[place] += rewards.sum()
        self.b_N[place] += len(rewards) - rewards.sum()

    def beliefs(self) -> dict[str, np.ndarray]:
        return {"a": self.a_N, "b": self.b_N}

    def columns(self) -> dict[str, np.ndarray]:
        return {"pass_rate": self.a_N / (self.a_N + self.b_N)}
