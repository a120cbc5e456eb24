"""MoPPS: a Beta posterior for each prompt, and Thompson sampling among random candidates."""

from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from cropi.curriculum.chooser import Choice, ChoosesBatches, Pool, RewardChooser
from cropi.curriculum.strategy import Need, StrategyTable

TARGET = 0.5  # mu*, the target pass rate (released code)


class MoppsStrategy(ChoosesBatches, StrategyTable):
    """Of random candidates, the prompts whose pass rate, drawn from a posterior, is nearest to 1/2 (MoPPS)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"rewards"})

    type: Literal["mopps"]
    candidates: Annotated[int, Field(ge=1)] = 8
    """Candidates for each place of a batch (released script: 8)."""
    kept: Annotated[float, Field(ge=0, le=1)] = 0.5
    """lambda: share of its earlier evidence that a prompt keeps when it is trained on again (released script: 0.5)."""

    def chooser(self, pool: Pool) -> "Mopps":
        return Mopps(pool, self.candidates, self.kept)


class Mopps(RewardChooser):
    """Choose the smallest (q_i - mu*)^2 with q_i ~ Beta(a_i, b_i), from Beta(1, 1) (MoPPS, arXiv 2507.04632).

    n rewards with the sum r: a <- lambda a + 1 - lambda + r, b <- lambda b + 1 - lambda + n - r, of the prompts that
    were trained on alone. (The released code sets a to 8 for n = 1, by precedence of its operators; here n = 1 is no
    exception.)
    """

    def __init__(self, pool: Pool, candidates: int, kept: float) -> None:
        super().__init__(pool)
        self._candidates, self._kept = candidates, kept
        self.a_N, self.b_N = np.ones(len(pool)), np.ones(len(pool))

    def choose(self, count: int, step: int, generator: np.random.Generator) -> list[Choice]:
        asked = min(self._candidates * count, len(self.pool))
        places = generator.choice(len(self.pool), size=asked, replace=False)
        drawn = generator.beta(self.a_N[places], self.b_N[places])
        nearest = np.argsort((drawn - TARGET) ** 2, kind="stable")[:count]
        return [Choice(int(place), "draw", "") for place in places[nearest]]

    def learn(self, place: int, rewards: Float[np.ndarray, " K"], step: int) -> None:
        right, kept = float(rewards.sum()), self._kept
        self.a_N[place] = kept * self.a_N[place] + (1 - kept) + right
        self.b_N[place] = kept * self.b_N[place] + (1 - kept) + len(rewards) - right

    def beliefs(self) -> dict[str, np.ndarray]:
        return {"a": self.a_N, "b": self.b_N}

    def columns(self) -> dict[str, np.ndarray]:
        return {"pass_rate": self.a_N / (self.a_N + self.b_N)}
