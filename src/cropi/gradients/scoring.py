"""`score`: the influence of every training prompt on every validation set, at the current policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from cropi.artifacts import GOLD_UNPARSEABLE, NO_SIGNAL, OK, PROMPT_TOO_LONG, count_status, scores_schema, write_table
from cropi.config import Config, ScoreConfig
from cropi.console import progress, warn_once
from cropi.errors import SignalError
from cropi.functional.influence import influence, mean_direction
from cropi.functional.projection import Projector, SparseProjection
from cropi.functional.surrogate import NORMALIZER_OF_LOSS
from cropi.gradients.groups import Group, groups_of
from cropi.gradients.reference import SurrogateSettings, prompt_gradient, trainable_parameters
from cropi.seeds import unit_interval

FEW_GROUPS = 8  # below this many mixed validation groups a warning is given


def surrogate_settings(config: Config, loss_type: str, scale_rewards: str | bool) -> SurrogateSettings:
    """The surrogate that a run's settings and its trainer's loss call for.

    Rewards scaled by the deviation of the whole batch share that divisor, which ranks like no scaling.
    """
    normalizer, std = config.score.normalizer, config.score.advantage_std
    return SurrogateSettings(
        normalizer=NORMALIZER_OF_LOSS[loss_type] if normalizer == "auto" else normalizer,
        max_completion_length=config.collect.max_completion_length,
        temperature=config.collect.temperature,
        advantage_std=scale_rewards in {"group", True} if std == "auto" else std,
        batch_tokens=config.score.batch_tokens,
    )


class FeatureMaker:
    """Turns groups into gradient features of one model under one projection."""

    def __init__(self, model: nn.Module, projection: SparseProjection, settings: SurrogateSettings) -> None:
        self._model, self._settings = model, settings
        parameters = trainable_parameters(model)
        device = next(iter(parameters.values())).device
        self._projector = Projector(projection, {name: p.numel() for name, p in parameters.items()}, device)

    def __call__(self, group: Group) -> tuple[Tensor, float]:
        """(feature_D float32, effective sample share of the ratios)."""
        gradient = prompt_gradient(self._model, group, self._settings)
        return self._projector(gradient.gradients), gradient.ratio_ess


def score(
    config: Config,
    settings: SurrogateSettings,
    model: nn.Module,
    trajectories: Mapping[str, pa.Table],
    sources: Mapping[str, str],
    folder: Path,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write `scores.parquet` to `folder`: one row per training prompt, those without signal included (influence 0).

    `trajectories` maps "train" and "validation/NAME" to their tables, `sources` prompt ids to sources. Returns
    (rows by status, details). Raises SignalError where a validation set has no mixed group.
    """
    projection = SparseProjection(**config.score.projection.model_dump())
    make_feature = FeatureMaker(model, projection, settings)
    train = groups_of(trajectories["train"].to_pylist())
    names = sorted(name.removeprefix("validation/") for name in trajectories if name != "train")
    validation = validation_groups(trajectories, config.score)
    scored = [group for group in train.values() if group is not None and group.status == OK]
    scored += [group for groups in validation.values() for group in groups]
    with progress("score", len(scored), "prompts") as bar:
        directions = []
        for name in names:
            features = []
            for mixed in validation[name]:
                features.append(make_feature(mixed)[0])
                bar.advance()
            directions.append(mean_direction(torch.stack(features), config.score.validation_mean))
        directions_VD = torch.stack(directions)
        rows = []
        for prompt_id, source in sources.items():
            row = {"prompt_id": prompt_id, "source": source}
            if prompt_id in train:
                row |= _score(train[prompt_id], make_feature, directions_VD, names, config.score)
            else:
                row |= _no_influence(PROMPT_TOO_LONG, names)
            rows.append(row)
            if rows[-1]["status"] == OK:
                bar.advance()
    write_table(folder / "scores.parquet", rows, scores_schema(names))
    details = {
        "projection": projection.identity,
        "normalizer": settings.normalizer,
        "score": config.score.score,
        "validation_groups": {name: len(groups) for name, groups in validation.items()},
        "tokens": sum(group.completion_tokens for group in scored),
    }
    return count_status(row["status"] for row in rows), details


def validation_groups(trajectories: Mapping[str, pa.Table], config: ScoreConfig) -> dict[str, list[Group]]:
    """The mixed groups of every validation set: the others have a zero gradient. SignalError where a set has none."""
    names = sorted(name.removeprefix("validation/") for name in trajectories if name != "train")
    return {name: _mixed_groups(trajectories[f"validation/{name}"], name, config) for name in names}


def _mixed_groups(table: pa.Table, name: str, config: ScoreConfig) -> list[Group]:
    groups = groups_of(table.to_pylist())
    # By hash rather than by id: ids that start with a source's name would pick one source.
    chosen = sorted(groups, key=lambda i: unit_interval(0, "validation", i))[: config.max_validation_prompts]
    mixed = [group for i in sorted(chosen) if (group := groups[i]) is not None and group.status == OK]
    if not mixed:
        raise SignalError(
            f"none of the {len(chosen)} prompts of this validation set has both right and wrong completions, so it "
            "gives no direction to select by",
            where=f"prompts.validation.{name}",
            fix="use problems that the policy solves sometimes, or raise collect.validation_num_generations.",
        )
    if len(mixed) < FEW_GROUPS:
        warn_once(
            f"validation set {name}: only {len(mixed)} of {len(chosen)} prompts carry signal; influence will be noisy"
        )
    return mixed


def _score(
    group: Group | None, make_feature: FeatureMaker, directions_VD: Tensor, names: Sequence[str], config: ScoreConfig
) -> dict[str, Any]:
    """Status and influence of one prompt with trajectories."""
    if group is None:
        return _no_influence(GOLD_UNPARSEABLE, names)
    known = {"pass_rate": group.pass_rate, "completion_tokens": group.completion_tokens}
    if group.status == NO_SIGNAL:
        return _no_influence(NO_SIGNAL, names) | known
    feature_D, ratio_ess = make_feature(group)
    values_V = influence(feature_D, directions_VD, config.score)
    if not bool(torch.isfinite(values_V).all()):
        raise SignalError(
            f"the influence of prompt {group.prompt_id} is not a finite number: the policy has diverged",
            where="score",
            fix="lower trainer.learning_rate or set trainer.max_grad_norm, and start the run under another name.",
        )
    found = {f"influence/{name}": value for name, value in zip(names, values_V.tolist(), strict=True)}
    return known | found | {"status": OK, "feature_norm": float(feature_D.norm()), "ratio_ess": ratio_ess}


def _no_influence(status: str, names: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {f"influence/{name}": 0.0 for name in names}
    return row | {"status": status, "pass_rate": None, "completion_tokens": 0, "feature_norm": 0.0, "ratio_ess": None}
