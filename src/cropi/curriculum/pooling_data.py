"""Inputs of the `pooled` strategy, read from the tables of a scoring and from the policy's representations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from cropi.artifacts import OK


@dataclass(frozen=True)
class PoolingData:
    """Influence, pass rates and representations of N training and M validation prompts."""

    names: Sequence[str]  # of the validation sets
    representations_NE: Float[np.ndarray, "N E"]
    tries_N: Float[np.ndarray, " N"]  # stored trajectories; 0 if training sampled the newest ones, which are visits
    tried_at_N: Float[np.ndarray, " N"]  # the optimiser step at which they were sampled
    strengths_N: Float[np.ndarray, " N"]  # variance of the rewards when it was scored; 0 if it was not scored
    influence_NV: Float[np.ndarray, "N V"]
    errors_NV: Float[np.ndarray, "N V"]  # standard errors
    validation_sets: Sequence[str]  # the set of each of the M prompts
    validation_ME: Float[np.ndarray, "M E"]
    validation_tries_M: Float[np.ndarray, " M"]
    validation_tried_at: float
    validation_pass_rates_M: Float[np.ndarray, " M"]
    validation_variances_M: Float[np.ndarray, " M"]  # of the rewards
    validation_strengths_M: Float[np.ndarray, " M"]
    validation_influence_MV: Float[np.ndarray, "M V"]  # on the other prompts of the set
    validation_errors_MV: Float[np.ndarray, "M V"]


def read_pooling_data(
    names: Sequence[str],
    scores: pa.Table,
    validation: pa.Table,
    representations: Mapping[tuple[str, str], Float[np.ndarray, " E"]],
    sizes_N: Int[np.ndarray, " N"],
    tries_N: Float[np.ndarray, " N"],
    tried_at_N: Float[np.ndarray, " N"],
    validation_tried_at: float,
) -> PoolingData:
    """Build the inputs from the tables `scores` and `validation` of one scoring.

    `sizes_N` counts the trajectories of each prompt's newest group; the other arguments are as in `PoolingData`.
    A training prompt without a standard error counts as not scored; a validation prompt without one is left out.
    """
    errors_NV = _columns(scores, "standard_error", names)
    scored_N = np.array([status == OK for status in scores.column("status").to_pylist()])
    scored_N &= np.isfinite(errors_NV).all(axis=1)
    variances_N = np.nan_to_num(scores.column("reward_variance").to_numpy(zero_copy_only=False).astype(np.float64))
    validation_errors_MV = _columns(validation, "standard_error", names)
    known_M = np.isfinite(validation_errors_MV).all(axis=1)
    owners = validation.column("set").to_pylist()
    keys = zip(owners, validation.column("prompt_id").to_pylist(), strict=True)
    places_M = [representations[f"validation/{name}", i] for name, i in keys]
    columns = ("pass_rate", "reward_variance", "trajectories")
    p_M, variances_M, tries_M = (validation.column(name).to_numpy().astype(np.float64) for name in columns)
    return PoolingData(
        names=tuple(names),
        representations_NE=np.stack([representations["train", i] for i in scores.column("prompt_id").to_pylist()]),
        tries_N=tries_N,
        tried_at_N=tried_at_N,
        strengths_N=np.where(scored_N, _strength(variances_N, np.maximum(sizes_N, 2)), 0.0),
        influence_NV=_columns(scores, "influence", names),
        errors_NV=np.nan_to_num(errors_NV),
        validation_sets=[owner for owner, known in zip(owners, known_M, strict=True) if known],
        validation_ME=np.stack(places_M)[known_M],
        validation_tries_M=tries_M[known_M],
        validation_tried_at=validation_tried_at,
        validation_pass_rates_M=p_M[known_M],
        validation_variances_M=variances_M[known_M],
        validation_strengths_M=_strength(variances_M, tries_M)[known_M],
        validation_influence_MV=_columns(validation, "influence", names)[known_M],
        validation_errors_MV=validation_errors_MV[known_M],
    )


def _strength(variances_N: Float[np.ndarray, " N"], count_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Unbiased estimate of the rewards' variance from `count` tries."""
    return variances_N * count_N / (count_N - 1)


def _columns(table: pa.Table, kind: str, names: Sequence[str]) -> Float[np.ndarray, "N V"]:
    """Columns `kind/NAME` of a table; NaN for null."""
    columns = [table.column(f"{kind}/{name}").to_numpy(zero_copy_only=False).astype(np.float64) for name in names]
    return np.stack(columns, axis=1)
