"""Influence pooled over prompts that are alike, times how learnable a prompt is now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from cropi.config import PooledStrategy, SelectConfig
from cropi.console import warn_once
from cropi.curriculum.candidates import Candidates, Evidence, Ranking
from cropi.curriculum.draw import gumbel_keys
from cropi.functional.pooling import (
    Observed,
    Slopes,
    pooled_slopes,
    pooled_strengths,
    principal_points,
    trust_of,
    verdict_rates,
)
from cropi.functional.ranking import ranks, reciprocal_rank_fusion
from cropi.functional.ranking import selection_size as share_size


def pooled(candidates: Candidates, strategy: PooledStrategy, config: SelectConfig) -> Ranking:
    """s_i = w_i sum_v a_v slope_v(i) / b_v: what a step along a prompt's gradient gives the validation sets now.

    slope_v(i) is the posterior influence on set v of a prompt with i's neighbours, per unit of p (1 - p); see
    `functional.pooled_slopes`. Neighbours are told by the policy's own representation of the prompts, so no label is
    needed, and validation prompts count among them. Prompts that were never sampled are judged by their neighbours
    alone. w_i = E[p_i (1 - p_i)] now: see `_strengths`. b_v is what the best prompts gave set v at first (`_units`), so
    that sets count alike whatever the lengths of their gradients, and a_v what is left of it to learn
    (`_left_of_sets`).

    A set whose own prompts do not help one another (`_agreement` at most `significance`) points nowhere that is known:
    its slopes are taken to be 0, and a warning says so.

    Helpful are prompts whose slope lies `significance` standard errors of their neighbourhood above 0 and whose gain is
    at least `exhausted`: only they are chosen for their influence, so that a rare skill is not diluted up to the
    fraction. Sets share the places (`_balanced`). As prompts and sets are learned, places fall free (`_shares`) and go
    to other prompts, drawn in proportion to w, but for those that would do harm: significantly, and of at least
    `exhausted` with the larger of the strengths they have and had. Where nothing is helpful, influence has told
    nothing, and no prompt is left out as harmful either.
    """
    board = _board(candidates, strategy, config)
    _tell_of_sets(board, strategy.significance)
    order_N = board.scores_N
    if strategy.draw == "proportional":
        order_N = gumbel_keys(candidates, "helpful", np.log(np.maximum(board.scores_N, 1e-300)))
    chosen_N = _balanced(order_N, board.helpful_N, board.size, board)
    room = board.headroom if strategy.room == "headroom" else 1.0
    keep, others = _shares(board.gain_N[chosen_N], board.first_N[chosen_N], board.size, room)
    chosen_N = _balanced(order_N, chosen_N, keep, board)
    drawn_N = gumbel_keys(candidates, "pooled", np.log(board.strengths_N))
    left_out_N = board.harmful_N if board.helpful_N.any() else np.zeros_like(board.harmful_N)
    filler_N = _best(drawn_N, candidates.usable_N & ~chosen_N & ~left_out_N, others)
    # the helpful ones before the others, each by its own measure
    scores_N = np.where(
        chosen_N, 2 + _unit(board.scores_N), np.where(filler_N, 1 + _unit(drawn_N), _unit(board.scores_N))
    )
    return Ranking(scores_N, chosen_N | filler_N, "pooled influence", board.set_ranks, board.facts(chosen_N, filler_N))


@dataclass(frozen=True)
class _Board:
    """What all prompts would give a stage."""

    size: int  # places
    strengths_N: Float[np.ndarray, " N"]  # w
    tries_N: Float[np.ndarray, " N"]  # behind w, discounted by their age
    gain_N: Float[np.ndarray, " N"]
    first_N: Float[np.ndarray, " N"]  # the gain with the stored pass rates and nothing learned yet
    scores_N: Float[np.ndarray, " N"]  # what helpful prompts are ordered by
    helpful_N: Bool[np.ndarray, " N"]
    harmful_N: Bool[np.ndarray, " N"]
    owners_N: Int[np.ndarray, " N"] | None  # the set that each prompt serves best, where sets share the places
    agreement_V: Float[np.ndarray, " V"]
    left_V: Float[np.ndarray, " V"]
    headroom: float  # what is left of 1 - p since scoring, in the validation set that has learned least
    set_ranks: Mapping[str, Int[np.ndarray, " N"]]
    names: Sequence[str]
    trust: float
    bandwidth: float

    def facts(self, chosen_N: Bool[np.ndarray, " N"], filler_N: Bool[np.ndarray, " N"]) -> dict[str, Any]:
        """What decided the selection, for its manifest."""
        return {
            "helpful": int(self.helpful_N.sum()),
            "harmful": int(self.harmful_N.sum()),
            "chosen_as_helpful": int(chosen_N.sum()),
            "drawn_beside_them": int(filler_N.sum()),
            "headroom": round(self.headroom, 4),
            "agreement": self._by_set(self.agreement_V),
            "left_to_learn": self._by_set(self.left_V),
            "trust_in_validation_prompts": self.trust,
            "bandwidth": round(self.bandwidth, 6),
        }

    def _by_set(self, values_V: Float[np.ndarray, " V"]) -> dict[str, float | None]:
        pairs = zip(self.names, values_V.tolist(), strict=True)
        return {name: round(value, 4) if np.isfinite(value) else None for name, value in pairs}


def _board(candidates: Candidates, strategy: PooledStrategy, config: SelectConfig) -> _Board:
    evidence = candidates.evidence
    if evidence is None:
        raise ValueError("pooled influence needs evidence")
    places, names = _Places.of(evidence), evidence.names
    slopes, trust, bandwidth = _slopes(evidence, places, own=strategy.own)
    now, stored = (_strengths(candidates, evidence, places, strategy, bandwidth, now=now) for now in (True, False))
    size, w_N = share_size(config.fraction, len(candidates)), now.pool_N
    unit_V = _units(stored.pool_N[:, None] * slopes.values_NV, size)
    left_V = _left_of_sets(evidence, now.validation_M, stored.validation_M)
    headroom_V = _left_of_sets(evidence, 1 - now.validation_rates_M, 1 - stored.validation_rates_M)
    agreement_V = _agreement(evidence)
    known_V = ~(agreement_V <= strategy.significance)  # so is a set of which nothing can be said
    served_NV = slopes.values_NV * known_V * left_V / unit_V
    slope_N = served_NV.sum(axis=1)
    error_N = np.sqrt(((slopes.smooth_errors_NV * left_V / unit_V) ** 2).sum(axis=1))
    set_ranks = {name: ranks(w_N * slopes.values_NV[:, v]) for v, name in enumerate(names)}
    gain_N = w_N * slope_N
    scores_N = gain_N
    if strategy.fusion == "rank":
        scores_N = reciprocal_rank_fusion(np.stack(list(set_ranks.values()), axis=1), kappa=config.fusion.kappa)
    return _Board(
        size=size,
        strengths_N=w_N,
        tries_N=now.tries_N,
        gain_N=gain_N,
        first_N=stored.pool_N * (slopes.values_NV * known_V / unit_V).sum(axis=1),
        scores_N=scores_N,
        helpful_N=candidates.usable_N & (slope_N > strategy.significance * error_N) & (gain_N >= strategy.exhausted),
        harmful_N=(slope_N < -strategy.significance * error_N)
        & (np.maximum(w_N, stored.pool_N) * slope_N <= -strategy.exhausted),
        owners_N=served_NV.argmax(axis=1) if strategy.fusion == "balanced" else None,
        agreement_V=agreement_V,
        left_V=left_V,
        headroom=min(1.0, float(headroom_V.max())),
        set_ranks=set_ranks,
        names=names,
        trust=trust,
        bandwidth=bandwidth,
    )


def prompts_to_screen(candidates: Candidates, strategy: PooledStrategy, config: SelectConfig) -> list[str]:
    """Ids of prompts whose pass rate is to be looked at before a stage is chosen, the most promising first.

    Of twice as many of the best helpful prompts as a stage takes, those with less than `screen_generations` tries,
    discounted by their age: at most a share `screen` of the pool.
    """
    board = _board(candidates, strategy, config)
    promising_N = _best(board.scores_N, board.helpful_N, 2 * board.size)
    unknown_N = promising_N & (board.tries_N < strategy.screen_generations)
    order = sorted(np.flatnonzero(unknown_N).tolist(), key=lambda row: -board.scores_N[row])
    return [candidates.prompt_ids[row] for row in order[: share_size(strategy.screen, len(candidates))]]


def _units(stored_NV: Float[np.ndarray, "N V"], size: int) -> Float[np.ndarray, " V"]:
    """What the best prompts for each set give it at first, as many as a set's part of the places. At least a little:
    where nothing helps a set, nothing becomes large by being divided.
    """
    count = max(1, size // stored_NV.shape[1])
    best_V = np.sort(stored_NV, axis=0)[-count:].mean(axis=0)
    return np.maximum(best_V, 1e-3 * np.abs(stored_NV).max() + 1e-300)


def _shares(
    gain_C: Float[np.ndarray, " C"], first_C: Float[np.ndarray, " C"], size: int, room: float
) -> tuple[int, int]:
    """How many of the chosen prompts a stage takes, and how many others.

    The share of the chosen is what their gain is now, of what it was at first, and at most `room`. So a skill that is
    being learned makes room for others, and a rare one that is not is alone in its stage.
    """
    if not len(gain_C):
        return 0, size
    share = max(min(room, float(gain_C.sum() / np.maximum(first_C, gain_C).sum())), 1 / size)
    if len(gain_C) / share > size:
        keep = max(1, round(size * share))
        return keep, size - keep
    return len(gain_C), round(len(gain_C) / share) - len(gain_C)


def _balanced(
    scores_N: Float[np.ndarray, " N"], among_N: Bool[np.ndarray, " N"], count: int, board: _Board
) -> Bool[np.ndarray, " N"]:
    """The `count` highest scores of some rows, with places for each set in proportion to what is left of it to learn.

    A prompt counts for the set that it serves best. Otherwise, of two sets that pull apart, the one with the slightly
    better prompts would take all places. Places that a set cannot fill go to the best of the rest.
    """
    if board.owners_N is None:
        return _best(scores_N, among_N, count)
    left_V = board.left_V
    shares_V = left_V / left_V.sum() if left_V.sum() > 0 else np.full(len(left_V), 1 / len(left_V))
    found_N = np.zeros(len(scores_N), dtype=bool)
    for v, share in enumerate(shares_V):
        found_N |= _best(scores_N, among_N & (board.owners_N == v), int(share * count))
    return found_N | _best(scores_N, among_N & ~found_N, count - int(found_N.sum()))


def _best(scores_N: Float[np.ndarray, " N"], among_N: Bool[np.ndarray, " N"], count: int) -> Bool[np.ndarray, " N"]:
    """The `count` highest scores of some rows; of equals the first."""
    order = sorted(np.flatnonzero(among_N).tolist(), key=lambda row: -scores_N[row])[:count]
    found_N = np.zeros(len(scores_N), dtype=bool)
    found_N[order] = True
    return found_N


def _unit(values_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Shifted and scaled to lie in [0, 1), in the same order."""
    low, high = float(values_N.min()), float(values_N.max())
    return (values_N - low) / (high - low) * (1 - 1e-9) if high > low else np.zeros_like(values_N)


def _tell_of_sets(board: _Board, significance: float) -> None:
    """Name the validation sets that are not followed."""
    for name, value in zip(board.names, board.agreement_V.tolist(), strict=True):
        if value <= significance:
            warn_once(
                f"validation set {name} is not followed: its own prompts do not help one another ({value:.1f} standard "
                f"errors, {significance:g} are asked for), so its direction is not known from noise; raise "
                "collect.validation_num_generations, or give it more prompts that the policy solves sometimes"
            )


def _agreement(evidence: Evidence) -> Float[np.ndarray, " V"]:
    """By set, the mean influence of its prompts on the set's others, in standard errors of that mean.

    Its expectation is the squared length of the true direction, so a direction that is mostly noise has some 0. NaN
    where a set has less than two prompts with signal, or these do not differ.
    """
    found_V = np.full(len(evidence.names), np.nan)
    for v, name in enumerate(evidence.names):
        own_M = evidence.validation_influence_MV[[owner == name for owner in evidence.validation_sets], v]
        error = own_M.std(ddof=1) / np.sqrt(len(own_M)) if len(own_M) > 1 else 0.0
        if error > 0:
            found_V[v] = own_M.mean() / error
    return found_V


def _left_of_sets(
    evidence: Evidence, now_M: Float[np.ndarray, " M"], stored_M: Float[np.ndarray, " M"]
) -> Float[np.ndarray, " V"]:
    """By set, the mean of a number of its prompts now, over that when they were scored.

    Of p (1 - p): what is left of the length of the set's direction. One that has been learned points nowhere any more,
    and its old direction must not outweigh those of the others. Of 1 - p: what is left to gain.
    """
    sets = [np.array([owner == name for owner in evidence.validation_sets]) for name in evidence.names]
    return np.array([now_M[own_M].mean() / stored_M[own_M].mean() if own_M.any() else 1.0 for own_M in sets])


@dataclass(frozen=True)
class _Strengths:
    pool_N: Float[np.ndarray, " N"]
    validation_M: Float[np.ndarray, " M"]
    validation_rates_M: Float[np.ndarray, " M"]
    tries_N: Float[np.ndarray, " N"]


@dataclass(frozen=True)
class _Places:
    """Where the pool and the validation prompts lie, in the same coordinates."""

    pool_NE: Float[np.ndarray, "N E"]
    validation_ME: Float[np.ndarray, "M E"]

    @classmethod
    def of(cls, evidence: Evidence) -> _Places:
        points = principal_points(evidence.representations_NE, evidence.validation_ME)
        count = len(evidence.representations_NE)
        return cls(points[:count], points[count:])

    def observed(self, rows_S: Int[np.ndarray, " S"]) -> tuple[Float[np.ndarray, "O E"], Int[np.ndarray, " N"]]:
        """Places of some prompts of the pool and all validation prompts, and each pool prompt's row among them."""
        own_N = np.full(len(self.pool_NE), -1)
        own_N[rows_S] = np.arange(len(rows_S))
        return np.concatenate([self.pool_NE[rows_S], self.validation_ME]), own_N


def _slopes(evidence: Evidence, places: _Places, *, own: bool) -> tuple[Slopes, float, float]:
    """The slopes, and the trust in validation prompts and the bandwidth that tell them best."""
    scored_S = np.flatnonzero(evidence.strengths_N > 0)
    observed_OE, own_N = places.observed(scored_S)
    observed = Observed(
        observed_OE,
        np.concatenate([evidence.strengths_N[scored_S], evidence.validation_strengths_M]),
        np.concatenate([evidence.influence_NV[scored_S], evidence.validation_influence_MV]),
        np.concatenate([evidence.errors_NV[scored_S], evidence.validation_errors_MV]),
        guests_O=np.arange(len(observed_OE)) >= len(scored_S),
    )
    trust, bandwidth = trust_of(observed)
    rows_N = own_N if own else np.full_like(own_N, -1)
    return pooled_slopes(places.pool_NE, observed.trusting(trust), rows_N, bandwidth), trust, bandwidth


def _strengths(
    candidates: Candidates,
    evidence: Evidence,
    places: _Places,
    strategy: PooledStrategy,
    bandwidth: float,
    *,
    now: bool,
) -> _Strengths:
    """E[p (1 - p)] of every prompt from its own tries and its neighbours'; for grades, p of verdicts that vary as much.

    Tries are the stored trajectories and, with `now`, all that training has sampled since. One that is t stages old
    counts 2^(-t / half_life): the policy has changed since.
    """
    row_of = {prompt_id: row for row, prompt_id in enumerate(candidates.prompt_ids)}
    now = now and strategy.learnability == "now"
    step = candidates.stage * candidates.steps_per_stage if now else 0
    half_life = strategy.half_life * candidates.steps_per_stage
    counts_N = evidence.tries_N * 0.5 ** (np.maximum(step - evidence.tried_at_N, 0) / half_life)
    rates_N = verdict_rates(candidates.pass_rates_N, candidates.variances_N)
    successes_N = np.nan_to_num(rates_N) * counts_N
    if now:
        columns = ([v.mean_reward for v in candidates.visits], [v.variance for v in candidates.visits])
        means, variances = (np.array(column, dtype=np.float64) for column in columns)
        for visit, rate in zip(candidates.visits, verdict_rates(means, variances).tolist(), strict=True):
            weight = visit.tries * 0.5 ** ((step - visit.step) / half_life)
            counts_N[row_of[visit.prompt_id]] += weight
            successes_N[row_of[visit.prompt_id]] += weight * rate
    tried_S = np.flatnonzero(counts_N > 0)
    observed_OE, own_N = places.observed(tried_S)
    validation_M = evidence.validation_tries_M * 0.5 ** (max(step - evidence.validation_tried_at, 0) / half_life)
    means_M = evidence.validation_pass_rates_M
    rates_M = verdict_rates(means_M, evidence.validation_variances_M)
    counts_O = np.concatenate([counts_N[tried_S], validation_M])
    own_M = len(tried_S) + np.arange(len(validation_M))

    def posterior(points: np.ndarray, own: np.ndarray, of_validation_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        successes_O = np.concatenate([successes_N[tried_S], of_validation_M * validation_M])
        return pooled_strengths(points, observed_OE, successes_O, counts_O, own, bandwidth, strategy.prior)

    _, pool_N = posterior(places.pool_NE, own_N, rates_M)
    solved_M, strengths_M = posterior(places.validation_ME, own_M, rates_M)
    if not np.array_equal(means_M, rates_M):  # grades: what is left to gain goes by their mean
        solved_M, _ = posterior(places.validation_ME, own_M, means_M)
    return _Strengths(pool_N, strengths_M, solved_M, counts_N)
