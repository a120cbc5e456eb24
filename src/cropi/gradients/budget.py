"""Scores for less: a sub-sample of each group's trajectories, all of them for the contenders, and from the second stage
on nothing at all for prompts that cannot reach the cut.

See docs/decisions/budget.md for what each of these loses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from cropi.artifacts import OK
from cropi.functional.fusion import ranks, reciprocal_rank_fusion
from cropi.functional.sampling import balanced_factors, places, robust_line
from cropi.gradients.groups import Group
from cropi.gradients.ratios import RatioMoments
from cropi.gradients.scorer import BLOCK, Scorer
from cropi.seeds import derived_seed

How = Literal["full", "subsampled", "predicted"]

PROBE_SHARE, PROBE_LEAST = 0.05, 32
REACH = 1.645
"""Standard deviations above its prediction at which a score could still be: exceeded by 5 % of normal errors."""
ROUNDS = 8
"""Rounds of re-scoring after the first; two or three are usual."""


@dataclass(frozen=True)
class BudgetSettings:
    """What may be left out. With neither `trajectories` nor `rescore`, nothing is."""

    trajectories: int | None
    """Trajectories of a group that are scored at first, half of them of positive advantage; None: all."""
    contenders: float | None
    """Share of the pool that is then scored in full; None: none."""
    rescore: bool
    """Given the scores of the stage before, score only what can still reach the cut."""
    fraction: float
    """Share of the pool that will be selected: where the cut is."""
    kappa: float = 60.0
    """Of the reciprocal rank fusion that the selection will use."""
    truncate: bool = False
    """Of the same fusion: whether lists end at the cut."""

    def __post_init__(self) -> None:
        if self.trajectories is not None and self.trajectories < 2:
            raise ValueError(f"trajectories is {self.trajectories}; a group needs a better and a worse one")
        if self.contenders is not None and self.trajectories is None:
            raise ValueError("contenders without trajectories: every prompt is scored in full already")
        if self.contenders is not None and not self.fraction <= self.contenders <= 1:
            raise ValueError(f"contenders is {self.contenders}; it must be from {self.fraction} (fraction) to 1")


@dataclass(frozen=True)
class BudgetedScores:
    """Scores of all groups in their order, and what they are worth."""

    values_NV: Float[np.ndarray, "N V"]
    """Influence; 0 without signal, not finite where a group's own numbers are not."""
    how: list[How]
    norms_N: Float[np.ndarray, " N"]
    """Length of the gradient as it was scored (a sub-sample's is longer on average); NaN where predicted."""
    ratio_facts_NR: Float[np.ndarray, "N R"]
    """`ratios.FACTS` of the trajectories scored; NaN where predicted."""
    trajectories_scored: int
    """Those that went through the model, a second time counted again."""
    tokens_computed: int


def subsample_factors(group: Group, count: int, seed: int) -> list[float]:
    """Factor of each trajectory in a sub-sample of `count`, balanced between positive and negative advantage.

    n_s / m_s for the m_s drawn out of n_s trajectories of one sign, 0 for the others, so that the group's gradient is
    estimated without bias: advantages and Z_k come from all K rewards and lengths, which cost nothing. The draw depends
    on (seed, prompt_id, place in the group) alone.

    Halves, because advantages add up to 0: n_+ |A_+| = n_- |A_-|, and with gradients of equal spread that makes equal
    numbers the allocation of least variance (Neyman 1934).
    """
    keys_K = [derived_seed(seed, "trajectories", group.prompt_id, k) for k in range(len(group.completions))]
    return balanced_factors(_signs(group), keys_K, count)


def _signs(group: Group) -> list[int]:
    """Sign of each trajectory's advantage, 0 where it contributes nothing."""
    mean = sum(group.rewards) / len(group.rewards)
    signs = [(reward > mean) - (reward < mean) for reward in group.rewards]
    return [sign if completion else 0 for sign, completion in zip(signs, group.completions, strict=True)]


@dataclass(frozen=True)
class Cut:
    """The selection to come, as far as scores decide it: fusion and the number of places."""

    ids: Sequence[str]
    eligible_N: Bool[np.ndarray, " N"]
    """Rows with something to learn from."""
    places: int
    absent: int = 0
    """Prompts of the pool that are no row here: they have influence 0, and a rank."""
    kappa: float = 60.0
    depth: int | None = None

    def order(self, values_NV: Float[np.ndarray, "N V"]) -> list[int]:
        """Eligible rows with finite values, best fused score first."""
        usable_N = self.eligible_N & np.isfinite(values_NV).all(axis=1)
        places_N = ranks(self._fused(self._ranks(values_NV)), self.ids)
        return sorted(np.flatnonzero(usable_N).tolist(), key=lambda row: int(places_N[row]))

    def above(self, values_NV: Float[np.ndarray, "N V"]) -> list[int]:
        """Rows that would be selected."""
        return self.order(values_NV)[: self.places]

    def contenders(self, values_NV: Float[np.ndarray, "N V"], count: int) -> list[int]:
        """The `count` rows of best rank in any validation set's list or in the fused one; equals by the fused one.

        So each list gives its best in turn, and the count does not grow with the number of lists.
        """
        best_N = self._ranks(values_NV).min(axis=1)
        keys = [(min(int(best_N[row]), place), place, row) for place, row in enumerate(self.order(values_NV), start=1)]
        return [row for _, _, row in sorted(keys)[:count]]

    def reached(
        self, values_NV: Float[np.ndarray, "N V"], hoped_UV: Float[np.ndarray, "U V"]
    ) -> Bool[np.ndarray, " U"]:
        """Whether each row of `hoped_UV`, put beside the values as they are, would be at or above the cut."""
        selected = self.above(values_NV)
        if not selected:
            return np.ones(len(hoped_UV), dtype=bool)
        last = self._fused(self._ranks(values_NV))[selected[-1]]
        columns = zip(_finite(values_NV).T, hoped_UV.T, strict=True)
        lower_UV = np.stack([np.searchsorted(np.sort(now_N), hoped_U, side="right") for now_N, hoped_U in columns], 1)
        fused_U = self._fused(self._counted(1 + len(values_NV) - lower_UV, hoped_UV))
        return np.asarray(fused_U >= last, dtype=bool)

    def _ranks(self, values_NV: Float[np.ndarray, "N V"]) -> Int[np.ndarray, "N V"]:
        return self._counted(np.stack([ranks(now_N, self.ids) for now_N in _finite(values_NV).T], axis=1), values_NV)

    def _counted(self, ranks_NV: Int[np.ndarray, "N V"], values_NV: Float[np.ndarray, "N V"]) -> Int[np.ndarray, "N V"]:
        """Ranks with the absent prompts counted in: they stand above what is below 0."""
        return np.where(values_NV < 0, ranks_NV + self.absent, ranks_NV)

    def _fused(self, ranks_NV: Int[np.ndarray, "N V"]) -> Float[np.ndarray, " N"]:
        return reciprocal_rank_fusion(ranks_NV, kappa=self.kappa, depth=self.depth)


def _finite(values_NV: Float[np.ndarray, "N V"]) -> Float[np.ndarray, "N V"]:
    return np.where(np.isfinite(values_NV), values_NV, 0.0)


class Rescoring:
    """Which rows have to be scored again after the policy has moved. Numbers only: the caller does the scoring.

    A random probe tells how old scores map to new ones, per validation set: a robust line, and the root mean square of
    what it leaves (not a robust one: the heavy tail is what crosses the cut). A row whose predicted score plus `REACH`
    times that spread, in all sets at once, would bring it to the cut is scored; then the cut is looked at again, until
    no row outside can reach it.
    """

    def __init__(self, previous_NV: Float[np.ndarray, "N V"], cut: Cut, seed: int) -> None:
        self._previous_NV, self._cut = previous_NV, cut
        self._rated_N = cut.eligible_N & np.isfinite(previous_NV).all(axis=1)
        rows = sorted(
            np.flatnonzero(self._rated_N).tolist(), key=lambda row: (derived_seed(seed, "probe", cut.ids[row]), row)
        )
        self.probe = rows[: max(PROBE_LEAST, places(PROBE_SHARE, len(rows)))]

    def first(self) -> list[int]:
        """Rows to begin with: the probe, what was above the cut, and what has no old score."""
        unrated = np.flatnonzero(self._cut.eligible_N & ~self._rated_N).tolist()
        return sorted({*self.probe, *self._cut.above(self._previous_NV), *unrated})

    def predict(self, values_NV: Float[np.ndarray, "N V"]) -> tuple[Float[np.ndarray, "N V"], Float[np.ndarray, " V"]]:
        """(predicted score of every row, spread of the predictions' errors), from the probe's new values."""
        usable = [row for row in self.probe if np.isfinite(values_NV[row]).all()]
        if len(usable) < 3:  # too few to tell a spread
            return self._previous_NV, np.full(values_NV.shape[1], np.inf)
        lines_V2 = np.array(
            [
                robust_line(old_N, new_N)
                for old_N, new_N in zip(self._previous_NV[usable].T, values_NV[usable].T, strict=True)
            ]
        )
        predicted_NV = lines_V2[:, 0] + lines_V2[:, 1] * self._previous_NV
        errors_NV = values_NV[usable] - predicted_NV[usable]
        return predicted_NV, np.sqrt((errors_NV**2).sum(axis=0) / (len(usable) - 2))

    def following(self, values_NV: Float[np.ndarray, "N V"], scored_N: Bool[np.ndarray, " N"]) -> list[int]:
        """Rows to score next, given the values of the rows scored so far. Empty when no other can reach the cut."""
        predicted_NV, spread_V = self.predict(values_NV)
        outside = np.flatnonzero(self._rated_N & ~scored_N)
        current_NV = np.where(scored_N[:, None], values_NV, predicted_NV)
        if not len(outside):
            return []
        reached_U = self._cut.reached(current_NV, predicted_NV[outside] + REACH * spread_V)
        return [int(row) for row in outside[reached_U]]


class _Board:
    """The scores so far, and what they have cost."""

    def __init__(
        self,
        scorer: Scorer,
        groups: Sequence[Group],
        trajectories: int | None,
        seed: int,
        advance: Callable[[int], None] | None,
    ) -> None:
        self._scorer, self._groups, self._advance = scorer, groups, advance
        self._trajectories, self._seed = trajectories, seed
        self.eligible_N = np.array([group.status == OK for group in groups], dtype=bool)
        self.values_NV = np.zeros((len(groups), scorer([]).products_NV.shape[1]))
        self.how: list[How] = ["predicted" if eligible else "full" for eligible in self.eligible_N]
        self._norms_N = np.where(self.eligible_N, np.nan, 0.0)
        self._ratio_facts_NR = np.where(self.eligible_N[:, None], np.nan, RatioMoments().facts)
        self._scored, self._tokens = 0, 0

    @property
    def scored_N(self) -> Bool[np.ndarray, " N"]:
        return np.array([how != "predicted" for how in self.how], dtype=bool)

    def score(self, rows: Sequence[int]) -> None:
        """Score rows with something to learn from on their sub-samples, or in full if there are none."""
        self._score(rows, self._trajectories)

    def complete(self, rows: Sequence[int]) -> None:
        """Score those rows in full that are not."""
        self._score([row for row in rows if self.how[row] != "full"], None)

    def predict(self, predicted_NV: Float[np.ndarray, "N V"]) -> None:
        """Take predictions for the rows that have not been scored."""
        self.values_NV = np.where(self.scored_N[:, None], self.values_NV, predicted_NV)

    def scores(self) -> BudgetedScores:
        return BudgetedScores(self.values_NV, self.how, self._norms_N, self._ratio_facts_NR, self._scored, self._tokens)

    def _score(self, rows: Sequence[int], trajectories: int | None) -> None:
        for start in range(0, len(rows), BLOCK):
            block = [row for row in rows[start : start + BLOCK] if self.eligible_N[row]]
            groups = [self._groups[row] for row in block]
            factors = [
                [1.0] * len(group.completions)
                if trajectories is None
                else subsample_factors(group, trajectories, self._seed)
                for group in groups
            ]
            scored = self._scorer(groups, factors=factors, advance=self._advance)
            self.values_NV[block] = self._scorer.values(scored)
            self._norms_N[block], self._ratio_facts_NR[block] = scored.norms_N, scored.ratio_facts_NR
            self._tokens += scored.tokens_computed
            for row, group, of_group in zip(block, groups, factors, strict=True):
                self.how[row] = "subsampled" if 0 in of_group else "full"
                self._scored += sum(sign != 0 != factor for sign, factor in zip(_signs(group), of_group, strict=True))


def budgeted(
    scorer: Scorer,
    groups: Sequence[Group],
    settings: BudgetSettings,
    previous: Float[np.ndarray, "N V"] | None = None,
    *,
    seed: int,
    stage: int = 0,
    pool: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> BudgetedScores:
    """Influence of groups on the sets that the scorer is aimed at, with no more work than the settings ask for.

    First a score for each group, of its sub-sample if there is one; with `rescore` and `previous` scores (NaN: none)
    only for those that `Rescoring` names, and a prediction for the others. Then the contenders are scored in full. At
    last the selection that would come of it: with `contenders`, whatever it holds is scored in full (without, it is at
    least not predicted), and it is looked at again until it holds nothing else.

    Sub-sampled and full inner products estimate the same number without bias, so they are on one scale and compared as
    they are. A sub-sample's cosine has a bias: noise makes its gradient too long, hence the cosine too small, so that
    nothing outranks a contender by it.

    seed, stage: a seed draws the same sub-samples at every stage, so that between stages scores change by what the
    policy has learnt and not by the draw; every stage has a probe of its own.
    pool: how many prompts `fraction` and `contenders` are shares of; by default the groups.
    advance: told how many groups each finished pack held; a group that is scored twice counts twice.
    Raises ValueError for a sub-sample with the reference estimator, which knows no factors.
    """
    if settings.trajectories is not None and scorer.estimator == "reference":
        raise ValueError("a sub-sample of trajectories needs estimator='exact' or 'sketch'")
    pool = len(groups) if pool is None else pool
    board = _Board(scorer, groups, settings.trajectories, seed, advance)
    size = places(settings.fraction, pool)
    ids = [group.prompt_id for group in groups]
    depth = size if settings.truncate else None
    cut = Cut(ids, board.eligible_N, size, pool - len(groups), settings.kappa, depth)
    if not board.eligible_N.any():
        return board.scores()
    if settings.rescore and previous is not None:
        _rescore(board, Rescoring(previous, cut, derived_seed(seed, "stage", stage)))
    else:
        board.score(range(len(groups)))
    raise_level, enough = board.score, {"full", "subsampled"}
    if settings.contenders is not None:
        board.complete(cut.contenders(board.values_NV, places(settings.contenders, pool)))
        raise_level, enough = board.complete, {"full"}
    while missing := [row for row in cut.above(board.values_NV) if board.how[row] not in enough]:
        raise_level(missing)
    return board.scores()


def _rescore(board: _Board, rescoring: Rescoring) -> None:
    rows = rescoring.first()
    for _ in range(1 + ROUNDS):
        board.score(rows)
        rows = rescoring.following(board.values_NV, board.scored_N)
        if not rows:
            break
    board.predict(rescoring.predict(board.values_NV)[0])
