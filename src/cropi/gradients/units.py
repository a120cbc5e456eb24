"""What a group's influence is made of: each trajectory's own inner products, before any advantage.

u_k = <sum_t w_t grad log pi(x_{k,t}), d> does not depend on rewards, on the group or on the normaliser, with one
exception: `clipped` ratios depend on the sign of the advantage, which is taken from the whole group. So the influence
of the group, of any part of it, and under any normaliser is a sum of u_k A_k / Z_k: error bars cost no further pass
through the policy. (Under `clipped`, and with graded rewards alone, a part may have other signs than the whole.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from cropi.artifacts import OK
from cropi.functional import influence as functional
from cropi.functional.resampling import jackknife_error, leave_one_out
from cropi.gradients.groups import Group
from cropi.gradients.packing import Segment
from cropi.gradients.ratios import RatioMoments
from cropi.gradients.surrogate import SurrogateSettings, scales_of

if TYPE_CHECKING:
    from cropi.gradients.engine import Engine


@dataclass(frozen=True)
class Units:
    """The trajectories of one group, met with V directions."""

    rewards_K: Float[np.ndarray, " K"]
    lengths_K: Int[np.ndarray, " K"]
    products_KV: Float[np.ndarray, "K V"]
    """<sum_t w_t grad log pi(x_{k,t}), d_v>."""
    gram_KK: Float[np.ndarray, "K K"] | None
    """Inner products of the trajectories' gradients; None where nobody needs lengths."""
    ratios: list[RatioMoments]

    def scales(
        self, settings: SurrogateSettings, subsets_XK: Int[np.ndarray, "X k"] | None = None
    ) -> Float[np.ndarray, "X k"]:
        """A_k / Z_k as if each subset were the group; one row, of all trajectories, without subsets."""
        subsets_XK = self._all() if subsets_XK is None else subsets_XK
        logs_K = np.array([moments.mean_log for moments in self.ratios])
        return scales_of(self.rewards_K[subsets_XK], self.lengths_K[subsets_XK], settings, logs_K[subsets_XK])

    def products(
        self, settings: SurrogateSettings, subsets_XK: Int[np.ndarray, "X k"] | None = None
    ) -> Float[np.ndarray, "X V"]:
        """<g, d_v> of each subset."""
        scales_XK = self.scales(settings, subsets_XK)
        products_XKV = self.products_KV[self._all() if subsets_XK is None else subsets_XK]
        # A trajectory that adds nothing may hold numbers that are not finite.
        return np.where(scales_XK[..., None] == 0, 0.0, scales_XK[..., None] * products_XKV).sum(axis=1)

    def norms(
        self, settings: SurrogateSettings, subsets_XK: Int[np.ndarray, "X k"] | None = None
    ) -> Float[np.ndarray, " X"]:
        """|g| of each subset; NaN where the inner products of the trajectories are not known."""
        scales_XK = self.scales(settings, subsets_XK)
        if self.gram_KK is None:
            return np.full(len(scales_XK), np.nan)
        subsets_XK = self._all() if subsets_XK is None else subsets_XK
        grams_XKK = self.gram_KK[subsets_XK[:, :, None], subsets_XK[:, None, :]]
        return np.sqrt(np.einsum("xk,xkl,xl->x", scales_XK, grams_XKK, scales_XK).clip(min=0))

    def values(
        self,
        settings: SurrogateSettings,
        score: functional.Score,
        norms_V: Float[np.ndarray, " V"],
        subsets_XK: Int[np.ndarray, "X k"] | None = None,
    ) -> Float[np.ndarray, "X V"]:
        """Influence of each subset."""
        products_XV = self.products(settings, subsets_XK)
        if score == "dot":
            return products_XV
        variances_X = functional.reward_variance(self.rewards_K[self._all() if subsets_XK is None else subsets_XK])
        return functional.influence(products_XV, self.norms(settings, subsets_XK), norms_V, score, variances_X)

    def errors(
        self, settings: SurrogateSettings, score: functional.Score, norms_V: Float[np.ndarray, " V"]
    ) -> Float[np.ndarray, " V"]:
        """Jackknife standard error of the influence: advantages and Z are those of the K - 1 trajectories left."""
        if len(self.rewards_K) < 3:
            return np.full(self.products_KV.shape[1], np.nan)
        return jackknife_error(self.values(settings, score, norms_V, leave_one_out(len(self.rewards_K))))

    def total(self) -> RatioMoments:
        """Of all trajectories."""
        return sum(self.ratios, RatioMoments())

    def _all(self) -> Int[np.ndarray, "1 K"]:
        return np.arange(len(self.rewards_K))[None]


def unit_segments(group: Group, first_row: int, settings: SurrogateSettings) -> list[Segment]:
    """One segment for each trajectory with a token, in result rows from `first_row` on; its scale is 1.

    -1 where the correction of ratios needs the advantage's sign and it is negative: see `unit_signs`.
    """
    signs = unit_signs(group, settings)
    segments = []
    for k, completion in enumerate(group.completions):
        logprobs = None if group.behaviour_logprobs is None else [group.behaviour_logprobs[k]]
        if completion:
            segments.append(Segment(first_row + k, group.prompt_ids, [completion], [float(signs[k])], logprobs))
    return segments


def unit_rows(groups: Sequence[Group], settings: SurrogateSettings) -> tuple[list[int], list[list[Segment]]]:
    """Where each group's trajectories begin among the result rows (and how many rows there are, last), and their
    segments by group; none where there is no signal."""
    starts = np.cumsum([0, *(len(group.completions) for group in groups)]).tolist()
    segments = [
        unit_segments(group, start, settings) if group.status == OK else []
        for start, group in zip(starts, groups, strict=False)
    ]
    return starts, segments


def mean_log_ratios(engine: Engine, groups: Sequence[Group]) -> list[list[float] | None]:
    """Of each group's trajectories, by a forward pass, where the baseline is weighted by them."""
    if engine.settings.baseline == "group":
        return [None] * len(groups)
    starts, segments = unit_rows(groups, engine.settings)
    work = engine.logprobs([segment for own in segments for segment in own])
    return [
        [work.of(row).mean_log for row in range(start, start + len(group.completions))]
        for start, group in zip(starts, groups, strict=False)
    ]


def unit_signs(group: Group, settings: SurrogateSettings) -> Float[np.ndarray, " K"]:
    """Sign of each trajectory's advantage within its group where clipping depends on it, else 1."""
    rewards_K = np.array(group.rewards, dtype=np.float64)
    if settings.correction != "clipped":
        return np.ones(len(rewards_K))
    signs_K = np.sign(rewards_K - rewards_K.mean())
    return np.where(signs_K == 0, 1.0, signs_K)


def without_signal(group: Group, sets: int) -> Units:
    """The units of a group that nothing is computed for."""
    count = len(group.completions)
    lengths_K = np.array([len(completion) for completion in group.completions], dtype=np.int64)
    rewards_K = np.array(group.rewards, dtype=np.float64)
    return Units(rewards_K, lengths_K, np.zeros((count, sets)), np.zeros((count, count)), [RatioMoments()] * count)


def restricted(units: Units, keep_K: Int[np.ndarray, " k"]) -> Units:
    """The same for some of the trajectories."""
    return replace(
        units,
        rewards_K=units.rewards_K[keep_K],
        lengths_K=units.lengths_K[keep_K],
        products_KV=units.products_KV[keep_K],
        gram_KK=None if units.gram_KK is None else units.gram_KK[np.ix_(keep_K, keep_K)],
        ratios=[units.ratios[k] for k in keep_K],
    )
