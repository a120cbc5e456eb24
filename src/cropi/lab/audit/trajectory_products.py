"""Inner products of single trajectories with the directions, before any advantage.

u_k = <sum_t w_t grad log pi(x_{k,t}), d> does not depend on rewards, on the group or on the normaliser. So the
influence of the group, and of any part of it, is a sum of u_k A_k / Z_k: subsets and error bars need no further pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from cropi.artifacts import OK
from cropi.gradients.groups import Group, RatioStatistics, SurrogateSettings, scales_of
from cropi.gradients.influence_scorer import Scorer
from cropi.gradients.packing import Segment

TRAJECTORIES = 512
"""Trajectories whose features are in memory at once."""


@dataclass(frozen=True)
class TrajectoryProducts:
    """Inner products of the trajectories of one group with V directions."""

    rewards_K: Float[np.ndarray, " K"]
    lengths_K: Int[np.ndarray, " K"]
    products_KV: Float[np.ndarray, "K V"]
    """<sum_t w_t grad log pi(x_{k,t}), d_v>."""
    gram_KK: Float[np.ndarray, "K K"] | None
    """Inner products of the trajectories' gradients with each other; None if not needed."""
    ratios: list[RatioStatistics]

    def scales(
        self, settings: SurrogateSettings, subsets_XK: Int[np.ndarray, "X k"] | None = None
    ) -> Float[np.ndarray, "X k"]:
        """Compute A_k / Z_k as if each subset were the group; without subsets, one row of all trajectories."""
        subsets_XK = self._all() if subsets_XK is None else subsets_XK
        return scales_of(self.rewards_K[subsets_XK], self.lengths_K[subsets_XK], settings)

    def products(
        self, settings: SurrogateSettings, subsets_XK: Int[np.ndarray, "X k"] | None = None
    ) -> Float[np.ndarray, "X V"]:
        """Compute <g, d_v> of each subset."""
        scales_XK = self.scales(settings, subsets_XK)
        products_XKV = self.products_KV[self._all() if subsets_XK is None else subsets_XK]
        # A trajectory with scale 0 may have numbers that are not finite.
        return np.where(scales_XK[..., None] == 0, 0.0, scales_XK[..., None] * products_XKV).sum(axis=1)

    def errors(self, settings: SurrogateSettings) -> Float[np.ndarray, " V"]:
        """Compute the jackknife error of <g, d_v>, with advantages and Z of the K - 1 trajectories left."""
        if len(self.rewards_K) < 3:
            return np.full(self.products_KV.shape[1], np.nan)
        return jackknife_error(self.products(settings, leave_one_out(len(self.rewards_K))))

    def restricted(self, keep_K: Int[np.ndarray, " k"]) -> TrajectoryProducts:
        """Keep some of the trajectories."""
        return replace(
            self,
            rewards_K=self.rewards_K[keep_K],
            lengths_K=self.lengths_K[keep_K],
            products_KV=self.products_KV[keep_K],
            gram_KK=None if self.gram_KK is None else self.gram_KK[np.ix_(keep_K, keep_K)],
            ratios=[self.ratios[k] for k in keep_K],
        )

    def total(self) -> RatioStatistics:
        """Sum the ratio statistics of all trajectories."""
        return sum(self.ratios, RatioStatistics())

    def _all(self) -> Int[np.ndarray, "1 K"]:
        return np.arange(len(self.rewards_K))[None]


def trajectory_products(
    scorer: Scorer, groups: Sequence[Group], advance: Callable[[int], None] | None = None
) -> Iterator[tuple[TrajectoryProducts, Tensor | None]]:
    """Yield each group's products and, for estimator `sketch`, the features (K, D) of its trajectories.

    Trajectories do not share their prompt in the pass, which costs the prompt's tokens K times.
    """
    block: list[Group] = []
    for group in groups:
        if block and sum(len(g.completions) for g in [*block, group]) > TRAJECTORIES:
            yield from _block_products(scorer, block, advance)
            block = []
        block.append(group)
    if block:
        yield from _block_products(scorer, block, advance)


def _block_products(
    scorer: Scorer, groups: Sequence[Group], advance: Callable[[int], None] | None
) -> Iterator[tuple[TrajectoryProducts, Tensor | None]]:
    starts = np.cumsum([0, *(len(group.completions) for group in groups)]).tolist()
    segments = [s for start, group in zip(starts, groups, strict=False) for s in _segments(group, start)]
    scored = scorer.score_segments(segments, starts[-1])
    for start, group in zip(starts, groups, strict=False):
        part = slice(start, start + len(group.completions))
        products = TrajectoryProducts(
            np.array(group.rewards, dtype=np.float64),
            np.array([len(completion) for completion in group.completions], dtype=np.int64),
            scored.products_NV[part],
            None,
            list(scored.ratios[part]),
        )
        if advance is not None:
            advance(1)
        yield products, None if scored.features_ND is None else scored.features_ND[part]


def _segments(group: Group, first_row: int) -> Iterator[Segment]:
    """Make one segment of scale 1 for each trajectory with a token; none without signal."""
    if group.status != OK:
        return
    for k, completion in enumerate(group.completions):
        logprobs = None if group.behaviour_logprobs is None else [group.behaviour_logprobs[k]]
        if completion:
            yield Segment(first_row + k, group.prompt_ids, [completion], [1.0], logprobs)


def leave_one_out(count: int) -> Int[np.ndarray, "K K-1"]:
    """Return all indices but k in row k."""
    return np.array([[j for j in range(count) if j != k] for k in range(count)]).reshape(count, count - 1)


def jackknife_error(estimates_KV: Float[np.ndarray, "K V"]) -> Float[np.ndarray, " V"]:
    """Compute the standard error from the estimates without trajectory k (Quenouille 1949, Tukey 1958):

    s^2 = (K - 1) / K sum_k (estimate_k - their mean)^2. It errs upwards, by about 1 / K of itself for advantages
    against the group's mean (Efron and Stein 1981). NaN for fewer than three: a group of two without one has no
    advantages.
    """
    count = len(estimates_KV)
    if count < 3:
        return np.full(estimates_KV.shape[1], np.nan)
    deviations_KV = estimates_KV - estimates_KV.mean(axis=0)
    return np.sqrt((count - 1) / count * (deviations_KV**2).sum(axis=0))
