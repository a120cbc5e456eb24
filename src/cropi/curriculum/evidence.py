"""From the tables of a stage to what pooling goes by."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from cropi.artifacts import OK
from cropi.curriculum.candidates import Evidence


def gather_evidence(
    names: Sequence[str],
    prompt_ids: Sequence[str],
    scores: pa.Table,
    validation: pa.Table,
    representations: Mapping[tuple[str, str], Float[np.ndarray, " E"]],
    sizes_N: Int[np.ndarray, " N"],
    tried_at: Mapping[str, float],
    trained: Collection[str],
    validation_tried_at: float,
) -> Evidence:
    """`scores` and `validation` are tables of one scoring, `sizes_N` the trajectories of each prompt's newest group.

    `tried_at` is the step at which that was sampled, for those that are not the base policy's; `trained` holds the
    prompts whose newest group training itself sampled: those are counted as visits.

    A prompt whose error is not known counts as not scored, a validation prompt as not there.
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
    return Evidence(
        names=tuple(names),
        representations_NE=np.stack([representations["train", i] for i in prompt_ids]),
        tries_N=np.array([0.0 if i in trained else float(n) for i, n in zip(prompt_ids, sizes_N, strict=True)]),
        tried_at_N=np.array([tried_at.get(i, 0.0) for i in prompt_ids], dtype=np.float64),
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
    """The unbiased estimate of the rewards' variance from `count` tries."""
    return variances_N * count_N / (count_N - 1)


def _columns(table: pa.Table, kind: str, names: Sequence[str]) -> Float[np.ndarray, "N V"]:
    """Columns `kind/NAME` of a table; NaN for null."""
    columns = [table.column(f"{kind}/{name}").to_numpy(zero_copy_only=False).astype(np.float64) for name in names]
    return np.stack(columns, axis=1)
