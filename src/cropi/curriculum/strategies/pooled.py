"""Influence pooled over similar prompts, times how learnable a prompt is now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field

from cropi.console import warn_once
from cropi.curriculum.pooling_data import PoolingData
from cropi.curriculum.strategy import Candidates, FusionConfig, Need, Ranking, StrategyTable, gumbel_keys
from cropi.functional.pooling import (
    Observed,
    Slopes,
    pooled_slopes,
    pooled_strengths,
    principal_points,
    trust_of,
    verdict_rates,
)
from cropi.functional.ranking import ranks
from cropi.functional.ranking import selection_size as share_size
from cropi.setting_types import Fraction

SCREEN_GENERATIONS = 4  # completions for each screened prompt
HALF_LIFE = 0.5  # stages after which a try counts half in the current pass rate
PRIOR = 2.0  # tries that the neighbours' pass rate counts for beside a prompt's own
SIGNIFICANCE = 1.0  # standard errors that a prompt's slope must lie above 0 to be helpful
EXHAUSTED = 0.2  # share of the best initial gain below which a prompt is not helpful, and harm does not count


class PooledStrategy(StrategyTable):
    """The prompts with the largest influence, estimated from similar prompts too, times their learnability now."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories", "gradients", "validation", "rewards"})
    pools: ClassVar[bool] = True

    type: Literal["pooled"]
    """Selects this strategy."""
    rescore_every: Annotated[int, Field(ge=0)] = 0
    """Stages between two scorings. 0: score once, at the base policy."""
    screen: Fraction = 0.1
    """Largest share of the pool that is sampled before each stage: candidates whose current pass rate is unknown, four
    completions each."""

    def scored_stage(self, stage: int) -> int:
        return stage - stage % self.rescore_every if self.rescore_every else 0

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """s_i = w_i sum_v a_v slope_v(i) / b_v: the gain of the validation sets from a step along a prompt's gradient.

        slope_v(i) is the posterior influence on set v of a prompt with i's neighbours, per unit of p (1 - p); see
        `functional.pooled_slopes`. Neighbours are found by the policy's representation of the prompts, without labels;
        validation prompts are neighbours too. Prompts without trajectories are judged by their neighbours alone.
        w_i = E[p_i (1 - p_i)] now: see `_strengths`. b_v is the initial gain of set v from its best prompts
        (`_scales`), so that sets count alike whatever the lengths of their gradients. a_v is the share left to learn
        (`_left_of_sets`).

        If the prompts of a set do not help one another (`_agreement` at most `SIGNIFICANCE`), its direction is unknown:
        its slopes are set to 0, with a warning.

        A prompt is helpful if its slope lies `SIGNIFICANCE` standard errors of its neighbourhood above 0 and its gain
        is at least `EXHAUSTED`. Only helpful prompts are selected for their influence, so that a rare skill is not
        diluted up to the fraction. Sets share the places (`_balanced`). As prompts and sets are learned, places become
        free (`_shares`) and go to other prompts, drawn in proportion to w, except harmful ones: those with a
        significantly negative slope and a harm of at least `EXHAUSTED` at the larger of their two strengths. If no
        prompt qualifies as helpful, harmful prompts are not excluded either.
        """
        estimate = _estimate(candidates, size)
        _warn_of_ignored_sets(estimate)
        chosen_N = _balanced(estimate.gain_N, estimate.helpful_N, size, estimate)
        keep, others = _shares(estimate.gain_N[chosen_N], estimate.first_N[chosen_N], size, estimate.headroom)
        chosen_N = _balanced(estimate.gain_N, chosen_N, keep, estimate)
        drawn_N = gumbel_keys(candidates, "pooled", np.log(estimate.strengths_N))
        left_out_N = estimate.harmful_N if estimate.helpful_N.any() else np.zeros_like(estimate.harmful_N)
        filler_N = _best(drawn_N, candidates.usable_N & ~chosen_N & ~left_out_N, others)
        # helpful prompts before the others, each group by its own measure
        scores_N = np.where(
            chosen_N, 2 + _unit(estimate.gain_N), np.where(filler_N, 1 + _unit(drawn_N), _unit(estimate.gain_N))
        )
        facts = estimate.facts(chosen_N, filler_N)
        return Ranking(scores_N, chosen_N | filler_N, "pooled influence", estimate.set_ranks, facts)

    def prompts_to_screen(self, candidates: Candidates, size: int) -> list[str]:
        """Ids of prompts whose pass rate should be measured before a stage of `size` prompts, most promising first.

        Takes the 2 `size` best helpful prompts that have fewer than `SCREEN_GENERATIONS` tries, discounted by age: at
        most a share `screen` of the pool.
        """
        estimate = _estimate(candidates, size)
        promising_N = _best(estimate.gain_N, estimate.helpful_N, 2 * size)
        unknown_N = promising_N & (estimate.tries_N < SCREEN_GENERATIONS)
        order = sorted(np.flatnonzero(unknown_N).tolist(), key=lambda row: -estimate.gain_N[row])
        return [candidates.prompt_ids[row] for row in order[: share_size(self.screen, len(candidates))]]


@dataclass(frozen=True)
class _Estimate:
    """Estimated gain of a stage from each prompt."""

    strengths_N: Float[np.ndarray, " N"]  # w
    tries_N: Float[np.ndarray, " N"]  # behind w, discounted by their age
    gain_N: Float[np.ndarray, " N"]
    first_N: Float[np.ndarray, " N"]  # the gain with the stored pass rates and nothing learned yet
    helpful_N: Bool[np.ndarray, " N"]
    harmful_N: Bool[np.ndarray, " N"]
    owners_N: Int[np.ndarray, " N"]  # the set that each prompt serves best
    agreement_V: Float[np.ndarray, " V"]
    left_V: Float[np.ndarray, " V"]
    headroom: float  # current 1 - p as a share of that at scoring, in the validation set that has learned least
    set_ranks: Mapping[str, Int[np.ndarray, " N"]]
    names: Sequence[str]
    trust: float
    bandwidth: float

    def facts(self, chosen_N: Bool[np.ndarray, " N"], filler_N: Bool[np.ndarray, " N"]) -> dict[str, Any]:
        """Intermediate results behind the selection, for its manifest."""
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


def _estimate(candidates: Candidates, size: int) -> _Estimate:
    data = candidates.pooling
    if data is None:
        raise ValueError("pooled influence needs pooling data")
    places, names = _Places.of(data), data.names
    slopes, trust, bandwidth = _slopes(data, places)
    now, stored = (_strengths(candidates, data, places, bandwidth, now=now) for now in (True, False))
    w_N, scale_V = now.pool_N, _scales(stored.pool_N[:, None] * slopes.values_NV, size)
    left_V = _left_of_sets(data, now.validation_M, stored.validation_M)
    headroom_V = _left_of_sets(data, 1 - now.validation_rates_M, 1 - stored.validation_rates_M)
    agreement_V = _agreement(data)
    known_V = ~(agreement_V <= SIGNIFICANCE)  # NaN, an unknown agreement, counts as known
    served_NV = slopes.values_NV * known_V * left_V / scale_V
    slope_N = served_NV.sum(axis=1)
    error_N = np.sqrt(((slopes.smooth_errors_NV * left_V / scale_V) ** 2).sum(axis=1))
    gain_N = w_N * slope_N
    return _Estimate(
        strengths_N=w_N,
        tries_N=now.tries_N,
        gain_N=gain_N,
        first_N=stored.pool_N * (slopes.values_NV * known_V / scale_V).sum(axis=1),
        helpful_N=candidates.usable_N & (slope_N > SIGNIFICANCE * error_N) & (gain_N >= EXHAUSTED),
        harmful_N=(slope_N < -SIGNIFICANCE * error_N) & (np.maximum(w_N, stored.pool_N) * slope_N <= -EXHAUSTED),
        owners_N=served_NV.argmax(axis=1),
        agreement_V=agreement_V,
        left_V=left_V,
        headroom=min(1.0, float(headroom_V.max())),
        set_ranks={name: ranks(w_N * slopes.values_NV[:, v]) for v, name in enumerate(names)},
        names=names,
        trust=trust,
        bandwidth=bandwidth,
    )


def _scales(stored_NV: Float[np.ndarray, "N V"], size: int) -> Float[np.ndarray, " V"]:
    """Mean initial gain of each set from its best prompts, as many as its share of the places.

    Bounded below by a small number: dividing by it must not inflate the gains of a set that no prompt helps.
    """
    count = max(1, size // stored_NV.shape[1])
    best_V = np.sort(stored_NV, axis=0)[-count:].mean(axis=0)
    return np.maximum(best_V, 1e-3 * np.abs(stored_NV).max() + 1e-300)


def _shares(
    gain_C: Float[np.ndarray, " C"], first_C: Float[np.ndarray, " C"], size: int, room: float
) -> tuple[int, int]:
    """Numbers of chosen prompts and of other prompts in a stage.

    The share of the chosen is their current gain over their initial gain, at most `room`. So a skill that is being
    learned leaves places to other prompts, and a rare skill that is not yet learned has its stage to itself.
    """
    if not len(gain_C):
        return 0, size
    share = max(min(room, float(gain_C.sum() / np.maximum(first_C, gain_C).sum())), 1 / size)
    if len(gain_C) / share > size:
        keep = max(1, round(size * share))
        return keep, size - keep
    return len(gain_C), round(len(gain_C) / share) - len(gain_C)


def _balanced(
    scores_N: Float[np.ndarray, " N"], among_N: Bool[np.ndarray, " N"], count: int, estimate: _Estimate
) -> Bool[np.ndarray, " N"]:
    """The `count` highest scores of some rows; each set gets places in proportion to its share left to learn.

    A prompt counts for the set that it serves best. By the sum alone, of two opposed sets the one with slightly better
    prompts would take all places. Places that a set cannot fill go to the best remaining prompts.
    """
    left_V = estimate.left_V
    shares_V = left_V / left_V.sum() if left_V.sum() > 0 else np.full(len(left_V), 1 / len(left_V))
    found_N = np.zeros(len(scores_N), dtype=bool)
    for v, share in enumerate(shares_V):
        found_N |= _best(scores_N, among_N & (estimate.owners_N == v), int(share * count))
    return found_N | _best(scores_N, among_N & ~found_N, count - int(found_N.sum()))


def _best(scores_N: Float[np.ndarray, " N"], among_N: Bool[np.ndarray, " N"], count: int) -> Bool[np.ndarray, " N"]:
    """The `count` highest scores of some rows; ties go to the first row."""
    order = sorted(np.flatnonzero(among_N).tolist(), key=lambda row: -scores_N[row])[:count]
    found_N = np.zeros(len(scores_N), dtype=bool)
    found_N[order] = True
    return found_N


def _unit(values_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Shift and scale to [0, 1), keeping the order."""
    low, high = float(values_N.min()), float(values_N.max())
    return (values_N - low) / (high - low) * (1 - 1e-9) if high > low else np.zeros_like(values_N)


def _warn_of_ignored_sets(estimate: _Estimate) -> None:
    """Name the validation sets whose direction is ignored."""
    for name, value in zip(estimate.names, estimate.agreement_V.tolist(), strict=True):
        if value <= SIGNIFICANCE:
            warn_once(
                f"validation set {name} is ignored: its prompts do not help one another ({value:.1f} standard errors, "
                f"at least {SIGNIFICANCE:g} needed), so its gradient cannot be told from noise; raise "
                "collect.validation_num_generations, or give it more prompts that the policy solves sometimes"
            )


def _agreement(data: PoolingData) -> Float[np.ndarray, " V"]:
    """Mean influence of each set's prompts on the set's others, in standard errors of that mean.

    Its expectation is the squared length of the true direction, so it is about 0 if noise dominates the direction. NaN
    if a set has fewer than two prompts with signal, or if these do not differ.
    """
    found_V = np.full(len(data.names), np.nan)
    for v, name in enumerate(data.names):
        own_M = data.validation_influence_MV[[owner == name for owner in data.validation_sets], v]
        error = own_M.std(ddof=1) / np.sqrt(len(own_M)) if len(own_M) > 1 else 0.0
        if error > 0:
            found_V[v] = own_M.mean() / error
    return found_V


def _left_of_sets(
    data: PoolingData, now_M: Float[np.ndarray, " M"], stored_M: Float[np.ndarray, " M"]
) -> Float[np.ndarray, " V"]:
    """Mean of each set's values now over their mean at scoring; the values are p (1 - p) or 1 - p of its prompts.

    With p (1 - p) this is the remaining length of the set's gradient: the old gradient of a learned set must not
    outweigh the others. With 1 - p it is the share left to gain.
    """
    sets = [np.array([owner == name for owner in data.validation_sets]) for name in data.names]
    return np.array([now_M[own_M].mean() / stored_M[own_M].mean() if own_M.any() else 1.0 for own_M in sets])


@dataclass(frozen=True)
class _Strengths:
    pool_N: Float[np.ndarray, " N"]
    validation_M: Float[np.ndarray, " M"]
    validation_rates_M: Float[np.ndarray, " M"]
    tries_N: Float[np.ndarray, " N"]


@dataclass(frozen=True)
class _Places:
    """Coordinates of the pool and of the validation prompts."""

    pool_NE: Float[np.ndarray, "N E"]
    validation_ME: Float[np.ndarray, "M E"]

    @classmethod
    def of(cls, data: PoolingData) -> _Places:
        points = principal_points(data.representations_NE, data.validation_ME)
        count = len(data.representations_NE)
        return cls(points[:count], points[count:])

    def observed(self, rows_S: Int[np.ndarray, " S"]) -> tuple[Float[np.ndarray, "O E"], Int[np.ndarray, " N"]]:
        """Coordinates of some pool prompts and all validation prompts, and each pool prompt's row among them."""
        own_N = np.full(len(self.pool_NE), -1)
        own_N[rows_S] = np.arange(len(rows_S))
        return np.concatenate([self.pool_NE[rows_S], self.validation_ME]), own_N


def _slopes(data: PoolingData, places: _Places) -> tuple[Slopes, float, float]:
    """Slopes, with the trust in validation prompts and the bandwidth that predict them best."""
    scored_S = np.flatnonzero(data.strengths_N > 0)
    observed_OE, own_N = places.observed(scored_S)
    observed = Observed(
        observed_OE,
        np.concatenate([data.strengths_N[scored_S], data.validation_strengths_M]),
        np.concatenate([data.influence_NV[scored_S], data.validation_influence_MV]),
        np.concatenate([data.errors_NV[scored_S], data.validation_errors_MV]),
        guests_O=np.arange(len(observed_OE)) >= len(scored_S),
    )
    trust, bandwidth = trust_of(observed)
    return pooled_slopes(places.pool_NE, observed.trusting(trust), own_N, bandwidth), trust, bandwidth


def _strengths(
    candidates: Candidates, data: PoolingData, places: _Places, bandwidth: float, *, now: bool
) -> _Strengths:
    """E[p (1 - p)] of every prompt from its own tries and its neighbours'; for grades, p of verdicts that vary as much.

    Tries are the stored trajectories and, with `now`, everything that training has sampled since. A try that is t
    stages old counts 2^(-t / `HALF_LIFE`), since the policy has changed.
    """
    row_of = {prompt_id: row for row, prompt_id in enumerate(candidates.prompt_ids)}
    step = candidates.stage * candidates.steps_per_stage if now else 0
    half_life = HALF_LIFE * candidates.steps_per_stage
    counts_N = data.tries_N * 0.5 ** (np.maximum(step - data.tried_at_N, 0) / half_life)
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
    validation_M = data.validation_tries_M * 0.5 ** (max(step - data.validation_tried_at, 0) / half_life)
    means_M = data.validation_pass_rates_M
    rates_M = verdict_rates(means_M, data.validation_variances_M)
    counts_O = np.concatenate([counts_N[tried_S], validation_M])
    own_M = len(tried_S) + np.arange(len(validation_M))

    def posterior(points: np.ndarray, own: np.ndarray, of_validation_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        successes_O = np.concatenate([successes_N[tried_S], of_validation_M * validation_M])
        return pooled_strengths(points, observed_OE, successes_O, counts_O, own, bandwidth, PRIOR)

    _, pool_N = posterior(places.pool_NE, own_N, rates_M)
    solved_M, strengths_M = posterior(places.validation_ME, own_M, rates_M)
    if not np.array_equal(means_M, rates_M):  # grades: what is left to gain goes by their mean
        solved_M, _ = posterior(places.validation_ME, own_M, means_M)
    return _Strengths(pool_N, strengths_M, solved_M, counts_N)
