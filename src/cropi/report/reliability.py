"""Whether a ranking by influence can be trusted: reliability, expected overlap with the truth, and drift."""

from __future__ import annotations

from collections.abc import Sequence

from cropi.artifacts import CLIP_RANGE
from cropi.config import Config
from cropi.report.blocks import Block, Table
from cropi.report.reading import directions
from cropi.report.results import Drift, Reliability, StageQuality
from cropi.report.wording import ABSENT, NOT_MEASURED, about, count, decimal, share, significant

RELIABILITY_CAPTION = (
    "Reliability: the share of the differences in influence that is not noise. Two scorings from other trajectories of "
    "the same prompts would correlate as much. Direction: how the validation set's own direction would correlate with "
    "one from as many other prompts. Expected: of the best ranked, how many belong among the truly best. By chance: of "
    "as many drawn at random. Errors are measured with `score.standard_errors=true`."
)
DRIFT_CAPTION = (
    "Drift of the policy from the one that sampled the stored trajectories, over the prompts with signal. Effective "
    "sample size: the median over prompts, as a share of a prompt's tokens. Clip share and KL: means."
)


def reliability(config: Config, stages: Sequence[StageQuality]) -> list[Block]:
    """Tables over the scored stages."""
    return [_reliability_table(stages, directions(config)), _drift_table(stages)]


def _reliability_table(stages: Sequence[StageQuality], names: Sequence[str]) -> Table:
    header = ["stage", *(f"reliability, {name}" for name in names), *(f"direction, {name}" for name in names)]
    rows = [
        [
            str(quality.stage),
            *_reliabilities(quality.reliability, names),
            *(_measured(quality.direction_reliability[name]) for name in names),
            *_overlap(quality.reliability),
        ]
        for quality in stages
    ]
    return Table(RELIABILITY_CAPTION, [*header, "best ranked", "expected", "by chance"], rows, left=0)


def _reliabilities(found: Reliability | None, names: Sequence[str]) -> list[str]:
    return [_measured(None if found is None else found.by_set[name]) for name in names]


def _measured(value: float | None) -> str:
    return NOT_MEASURED if value is None else decimal(value)


def _overlap(found: Reliability | None) -> list[str]:
    if found is None:
        return [ABSENT, NOT_MEASURED, ABSENT]
    return [count(found.best), about(found.best * found.expected_overlap), about(found.best * found.chance)]


def _drift_table(stages: Sequence[StageQuality]) -> Table:
    low, high = (significant(1 + sign * CLIP_RANGE) for sign in (-1, 1))
    header = ["stage", "effective sample size", f"outside {low} to {high}", "KL per token, nats"]
    rows = [[str(quality.stage), *_drift_cells(quality.drift)] for quality in stages]
    return Table(DRIFT_CAPTION, header, rows, left=0)


def _drift_cells(drift: Drift | None) -> list[str]:
    if drift is None:
        return [NOT_MEASURED] * 3
    return [decimal(drift.ratio_ess), share(drift.clip_share), decimal(drift.kl, 3)]
