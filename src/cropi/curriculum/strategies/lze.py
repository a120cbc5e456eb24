"""LZE: of every generation batch, backward passes for the groups that teach most."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from cropi.curriculum.chooser import Choice, ChoosesBatches, Pool, RewardChooser
from cropi.curriculum.strategy import Need, StrategyTable
from cropi.seeds import derived_seed

LEAST_SHARE = 0.3  # of the groups
LEAST_DIFFICULTY = 0.05
KEPT = 0.9  # of the running mean of pass rates, at a visit
CHANGE = 0.3  # what a changed pass rate adds at the most
NOISE = 0.05  # of the range of energies


class LzeStrategy(ChoosesBatches, StrategyTable):
    """Random prompts, of whose finished groups only the share with the most energy is trained on (LZE's gate)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"rewards"})

    type: Literal["lze"]
    share: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Groups of a generation batch that are trained on (released scripts: 0.4); 0.3 at least."""

    def trained_groups(self, groups: int) -> int:
        return max(1, int(groups * LEAST_SHARE), int(groups * self.share))

    def chooser(self, pool: Pool) -> "Lze":
        return Lze(pool, self)


class Lze(RewardChooser):
    """Train on the groups with the largest E_i + noise (arXiv 2605.17003).

    E = D 4 p (1 - p) (1 + 0.3 min(2 |p - m|, 1)), with p the group's pass rate, m the running mean before it, and D the
    prompt's first failure rate, 0.05 at least. Prompts come in random passes over the pool.
    """

    def __init__(self, pool: Pool, settings: LzeStrategy) -> None:
        super().__init__(pool)
        self._settings = settings
        self.difficulty_N, self.mean_N = np.full(len(pool), np.nan), np.full(len(pool), np.nan)

    def choose(self, count: int, step: int, generator: np.random.Generator) -> list[Choice]:
        places = generator.permutation(len(self.pool))
        fewest_first = places[np.argsort(self.times_N[places], kind="stable")]
        return [Choice(int(place), "uniform", "") for place in fewest_first[:count]]

    def learn(self, place: int, rewards: Float[np.ndarray, " K"], step: int) -> None:
        rate = float(rewards.mean())
        if np.isnan(self.mean_N[place]):
            self.difficulty_N[place], self.mean_N[place] = max(1 - rate, LEAST_DIFFICULTY), rate
        else:
            self.mean_N[place] = KEPT * self.mean_N[place] + (1 - KEPT) * rate

    def energy(self, place: int, rewards: Sequence[float]) -> float:
        """E of a group that was not observed yet; 0 for one that teaches nothing."""
        if not rewards or max(rewards) == min(rewards):
            return 0.0
        rate, mean = float(np.mean(rewards)), self.mean_N[place]
        first = max(1 - rate, LEAST_DIFFICULTY)
        difficulty, change = (first, 0.0) if np.isnan(mean) else (self.difficulty_N[place], abs(rate - mean))
        return float(difficulty * 4 * rate * (1 - rate) * (1 + CHANGE * min(2 * change, 1)))

    def kept(self, groups: Sequence[tuple[int, Sequence[float]]], batch: int) -> list[int]:
        """Numbers of the groups that are trained on. Where all are dead, one: a step has to be made of something."""
        scaled = [self.scaled(np.asarray(rewards, dtype=float)).tolist() for _, rewards in groups]
        energies = np.array([self.energy(place, own) for (place, _), own in zip(groups, scaled, strict=True)])
        active = np.flatnonzero(energies > 0)
        if not len(active):
            return [0]
        scale = NOISE * max(float(np.ptp(energies[active])), 0.01)
        generator = np.random.default_rng(derived_seed(self.pool.seed, "gate", batch))
        noisy = energies[active] + generator.gumbel(scale=scale, size=len(active))
        best = active[np.argsort(-noisy, kind="stable")[: self._settings.trained_groups(len(groups))]]
        return sorted(best.tolist())

    def beliefs(self) -> dict[str, np.ndarray]:
        return {"difficulty": self.difficulty_N, "mean": self.mean_N}

    def columns(self) -> dict[str, np.ndarray]:
        return {"pass_rate": self.mean_N, "difficulty": self.difficulty_N}
