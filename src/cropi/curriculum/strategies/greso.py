"""GRESO: skip most prompts whose recent rewards were all equal."""

from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, Literal

import numpy as np

from cropi.curriculum.strategy import Candidates, FusionConfig, Need, Ranking, StrategyTable
from cropi.seeds import unit_interval

EASY, HARD = "easy", "hard"
# All as in the released code.
START = 0.5  # probability that a prompt is kept after one visit of equal rewards, at first
CHANGE = 0.01  # change of these probabilities after each step
AIMS = {EASY: 0.25 / 3, HARD: 0.25 * 2 / 3}  # target shares of visits whose rewards were all right, or all wrong
LEAST, MOST = 0.05, 0.95  # bounds of the probabilities
FLOOR = 0.01  # least probability that a prompt is kept


class GresoStrategy(StrategyTable):
    """All prompts but those whose recent rewards were equal, which are skipped at random (GRESO)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"rewards"})
    takes_all: ClassVar[bool] = True

    type: Literal["greso"]
    """Selects this strategy."""

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """Keep every usable prompt with probability max(p^z_i, floor) (GRESO, arXiv 2506.02177).

        z_i: visits in a row, up to the newest, in which all rewards were 1 (p = p_easy) or all 0 (p = p_hard). Equal
        graded rewards count as 1 from 1/2 on, else as 0. Prompts with z_i = 0 and unvisited prompts are always kept.

        Published: the filter runs before every batch, and dynamic sampling fills the batches
        (`train.dynamic_sampling`). Here it runs at the start of a stage, and the stage trains on every kept prompt: the
        whole pool at stage 0, later whatever remains, regardless of `select.fraction`. It reads no stored trajectories.
        """
        state = replay(candidates)
        chance_N = np.array([state.chance(i) for i in candidates.prompt_ids])
        drawn_N = np.array(
            [unit_interval(candidates.seed, "greso", candidates.stage, i) for i in candidates.prompt_ids]
        )
        return Ranking(chance_N, candidates.usable_N & (drawn_N < chance_N), "kept")


@dataclass(frozen=True)
class FilterState:
    """State of the filter after the visits so far."""

    keep: dict[str, float]  # p_easy and p_hard
    streaks: dict[str, tuple[str, int]]  # by prompt id: kind and length

    def chance(self, prompt_id: str) -> float:
        """Probability that a prompt is kept."""
        kind, length = self.streaks.get(prompt_id, (EASY, 0))
        return max(self.keep[kind] ** length, FLOOR) if length else 1.0


def replay(candidates: Candidates) -> FilterState:
    """Compute streaks, p_easy and p_hard step by step from the visits.

    After a step, p_easy falls by `CHANGE` if the share of its visits with all rewards right reaches the target, and
    rises otherwise; p_hard likewise for all wrong. Both stay in [0.05, 0.95]. The released code starts with the second
    epoch; here the second stage is the first in which the filter can skip anything. (It also counts mean rewards up to
    0.11 as wrong and from 0.98 as right, for rewards that include a format share; here the rewards must be equal.)
    """
    keep, streaks = {EASY: START, HARD: START}, dict[str, tuple[str, int]]()
    for step, group in groupby(candidates.visits, key=lambda visit: visit.step):
        kinds = []
        for visit in group:
            kind = None if visit.variance > 0 else EASY if visit.mean_reward >= 0.5 else HARD
            last, length = streaks.get(visit.prompt_id, (kind, 0))
            if kind is None:
                streaks.pop(visit.prompt_id, None)
            else:
                streaks[visit.prompt_id] = (kind, length + 1 if kind == last else 1)
            kinds.append(kind)
        for kind, aim in AIMS.items() if step >= candidates.steps_per_stage else ():
            sign = -1 if kinds.count(kind) / len(kinds) >= aim else 1
            keep[kind] = min(MOST, max(LEAST, keep[kind] + sign * CHANGE))
    return FilterState(keep, streaks)
