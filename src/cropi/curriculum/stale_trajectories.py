"""Refresh of stored trajectories: which prompts to sample again, and a warning if they are too old."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan

import numpy as np
from jaxtyping import Bool, Float, Int

from cropi.artifacts import NO_SIGNAL, OK
from cropi.seeds import unit_interval

# Beyond any of these, a stage's scores depend more on old trajectories than on the policy.
LOW_ESS = 0.5  # half of the sample lost: where sequential Monte Carlo resamples (Liu & Chen 1995)
HIGH_CLIP_SHARE = 0.3  # PPO would take no step on so many tokens; training runs stay near 0.1 to 0.2
HIGH_KL = 0.1  # nats a token: 10 nats over a hundred tokens, completions that the policy would hardly write


def prompts_to_refresh(
    prompt_ids: Sequence[str],
    statuses: Sequence[str],
    drawn_N: Int[np.ndarray, " N"],
    reused_N: Bool[np.ndarray, " N"],
    ratio_ess_N: Float[np.ndarray, " N"],
    count: int,
    *,
    seed: int,
    stage: int,
) -> list[str]:
    """Choose at most `count` prompts of status `ok` or `no_signal` to sample again, most urgent first.

    `drawn_N` is the stage in which the current group was sampled (-1: before stage 0), `reused_N` whether training
    sampled it in the previous stage, `ratio_ess_N` its effective sample share in the newest scores (NaN: unknown).

    1. Groups without signal, oldest first: only new samples can make them useful. They get half of the places, rounded
       up, and the places that 2. does not need.
    2. Groups with signal by ascending `ratio_ess` to three decimals (more is rounding); unknown ones come last, oldest
       first. They get the other half, and the places that 1. does not need.
    3. Groups that training has just sampled, if places are left.

    Ties break by a hash of (seed, stage, prompt id), so that no prompt is first at every stage, and then by id.
    """
    chance_N = [unit_interval(seed, "refresh", stage, i) for i in prompt_ids]

    def age(row: int) -> tuple[int, float, str]:
        return int(drawn_N[row]), chance_N[row], prompt_ids[row]

    def drift(row: int) -> tuple[bool, float, tuple[int, float, str]]:
        unknown = isnan(ratio_ess_N[row])
        return unknown, 0.0 if unknown else round(float(ratio_ess_N[row]), 3), age(row)

    older = [row for row in range(len(prompt_ids)) if not reused_N[row]]
    silent = sorted((row for row in older if statuses[row] == NO_SIGNAL), key=age)
    drifted = sorted((row for row in older if statuses[row] == OK), key=drift)
    just = sorted((row for row in np.flatnonzero(reused_N).tolist() if statuses[row] in {OK, NO_SIGNAL}), key=age)
    of_silent = min(len(silent), max((count + 1) // 2, count - len(drifted)))
    queue = silent[:of_silent] + drifted[: count - of_silent] + just
    return [prompt_ids[row] for row in queue[:count]]


def drift_warning(drift: Mapping[str, float] | None, stage: int, *, refreshing: bool) -> str | None:
    """Return a warning if the stored trajectories are too old for a stage, else None.

    `drift` holds `ratio_ess` (median over prompts), `clip_share` and `kl` (means); None if nothing is known.
    """
    if drift is None:
        return None
    found = []
    if drift["ratio_ess"] < LOW_ESS:
        found.append(f"the median prompt keeps {drift['ratio_ess']:.0%} of its effective sample size (ratio_ess)")
    if drift["clip_share"] > HIGH_CLIP_SHARE:
        found.append(f"{drift['clip_share']:.0%} of the importance ratios are outside the clip range")
    if drift["kl"] > HIGH_KL:
        found.append(f"the divergence is {drift['kl']:.2f} nats a token")
    if not found:
        return None
    advice = "raise refresh.fraction" if refreshing else "set refresh.fraction or refresh.reuse_rollouts"
    return (
        f"stage {stage}: the policy has moved far from the one that sampled the trajectories, so influence is noisy or "
        f"biased: {'; '.join(found)}. {advice[0].upper()}{advice[1:]}, or train fewer steps per stage."
    )
