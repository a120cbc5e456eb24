"""GRESO: prompts whose rewards have lately been equal are left out, most of the time."""

from dataclasses import dataclass
from itertools import groupby

import numpy as np

from cropi.config import GresoStrategy, SelectConfig
from cropi.curriculum.candidates import Candidates, Ranking
from cropi.seeds import unit_interval

EASY, HARD = "easy", "hard"
LEAST, MOST = 0.05, 0.95  # bounds of the probabilities (released code)


def greso(candidates: Candidates, strategy: GresoStrategy, config: SelectConfig) -> Ranking:
    """Every usable prompt is kept with probability max(p^z_i, floor) (GRESO, arXiv 2506.02177).

    z_i: visits in a row, up to the newest, in which all rewards were 1 (p = p_easy) or all 0 (p = p_hard); of graded
    rewards, all equal, and at least 1/2 or less. A prompt with z_i = 0, or not visited yet, is always kept.

    Published: the filter runs before every batch, and batches are filled up to their size, with dynamic sampling behind
    it (`train.dynamic_sampling`). Here it runs at the start of a stage, and the stage trains on all prompts that it
    keeps: the whole pool at stage 0, later as many as come out, whatever `select.fraction` says. No stored trajectories
    are read.
    """
    past = replay(candidates, strategy)
    chance_N = np.array([past.chance(i, strategy.floor) for i in candidates.prompt_ids])
    drawn_N = np.array([unit_interval(candidates.seed, "greso", candidates.stage, i) for i in candidates.prompt_ids])
    return Ranking(chance_N, candidates.usable_N & (drawn_N < chance_N), "kept", {})


@dataclass(frozen=True)
class Past:
    """What the visits so far have come to."""

    keep: dict[str, float]  # p_easy and p_hard
    streaks: dict[str, tuple[str, int]]  # by prompt id: of which kind, and how long

    def chance(self, prompt_id: str, floor: float) -> float:
        """Probability that a prompt is kept."""
        kind, length = self.streaks.get(prompt_id, (EASY, 0))
        return max(self.keep[kind] ** length, floor) if length else 1.0


def replay(candidates: Candidates, strategy: GresoStrategy) -> Past:
    """Step by step through the visits: streaks, and p_easy and p_hard.

    After a step, p_easy falls by `change` where the share of its visits that were all right is at least a third of
    `zero_variance`, and rises otherwise; p_hard the same with visits all wrong and two thirds. Both stay in
    [0.05, 0.95]. The released code begins with the second epoch; here with the second stage, the first in which the
    filter can leave something out. (It also counts mean rewards up to 0.11 as wrong and from 0.98 as right, for rewards
    with a share for the format; here it is whether they are all equal.)
    """
    keep, streaks = {EASY: strategy.start, HARD: strategy.start}, dict[str, tuple[str, int]]()
    aims = {EASY: strategy.zero_variance / 3, HARD: strategy.zero_variance * 2 / 3}
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
        for kind, aim in aims.items() if step >= candidates.steps_per_stage else ():
            sign = -1 if kinds.count(kind) / len(kinds) >= aim else 1
            keep[kind] = min(MOST, max(LEAST, keep[kind] + sign * strategy.change))
    return Past(keep, streaks)
