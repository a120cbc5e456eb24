"""Whether a ranking by influence can be trusted: reliability, expected overlap with the truth, and drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from cropi.artifacts import CLIP_RANGE
from cropi.config import Config
from cropi.report import reliability_figures as figures
from cropi.report.blocks import Block, Picture, Table, Text
from cropi.report.reading import Selection, directions
from cropi.report.results import Drift, Reliability, StageQuality
from cropi.report.wording import ABSENT, NOT_MEASURED, about, count, decimal, percent, share, significant

RELIABILITY_CAPTION = (
    "Reliability: the share of the differences in influence that is not noise, or how two scorings from other "
    "trajectories of the same prompts would correlate (0: noise alone, 1: none). Direction: how the validation set's "
    "own direction would correlate with one from as many other prompts. Expected: of the best ranked, how many belong "
    "among the truly best; beside it, what a random draw would give."
)
DRIFT_CAPTION = (
    "Drift of the policy from the one that sampled the stored trajectories, over the prompts with signal. Effective "
    "sample size: the median over prompts, as a share of a prompt's tokens; clip share and KL: means."
)


def reliability(
    config: Config,
    stages: Sequence[StageQuality],
    scores: Mapping[int, pa.Table],
    selections: Mapping[int, Selection],
) -> list[Block]:
    """Sentences, figures and tables over the scored stages."""
    names = directions(config)
    drawn = figures.quality_by_stage(stages, names)
    caption = f"By stage. At most {figures.MAX_SETS} validation sets are drawn."
    return [
        Text(_ranking_sentence(config, stages[-1])),
        *_error_bars(config, stages, scores, selections),
        _reliability_table(stages, names),
        Text(_drift_sentence(stages[-1])),
        *([Picture(drawn, caption)] if drawn else []),
        _drift_table(stages),
    ]


def _ranking_sentence(config: Config, quality: StageQuality) -> str:
    found = quality.reliability
    if found is None:
        return "The errors of the influence were not measured in this run; `score.standard_errors=true` measures them."
    if found.chance >= 1:
        return f"At stage {quality.stage} every prompt with signal is among the best: there is nothing to rank."
    expected, by_chance = found.best * found.expected_overlap, found.best * found.chance
    plain = not config.select.quotas and not config.select.exploration
    which = f"{count(found.best)} selected" if plain else f"the {count(found.best)} best ranked"
    text = (
        f"About {about(expected)} of {which} prompts of stage {quality.stage} are expected to belong "
        f"among the best {count(found.best)}; chance would give {about(by_chance)}."
    )
    low, high = min(found.by_set.values()), max(found.by_set.values())
    if high == 0:
        return f"{text} On no validation set do the prompts differ by more than the noise of their influence."
    span = decimal(low) if decimal(low) == decimal(high) else f"{decimal(low)} to {decimal(high)}"
    return f"{text} A second scoring, from as many fresh trajectories, would correlate with this one by about {span}."


def _drift_sentence(quality: StageQuality) -> str:
    drift = quality.drift
    if drift is None:
        return "The drift of the policy was not measured."
    low, high = (significant(1 + sign * CLIP_RANGE) for sign in (-1, 1))
    return (
        f"At stage {quality.stage} the stored trajectories of the median prompt count as much as "
        f"{percent(drift.ratio_ess)} of as many fresh ones; {percent(drift.clip_share)} of the token ratios "
        f"lie outside {low} to {high}, and the policy is {decimal(drift.kl, 3)} nats per token from the one that "
        "sampled."
    )


def _error_bars(
    config: Config,
    stages: Sequence[StageQuality],
    scores: Mapping[int, pa.Table],
    selections: Mapping[int, Selection],
) -> list[Block]:
    """The figure of the last stage that is both scored and selected."""
    by_stage = {quality.stage: quality for quality in stages}
    for stage in sorted(selections, reverse=True):
        scored = config.select.strategy.scored_stage(stage)
        found = by_stage[scored].reliability if scored in by_stage else None
        if found is None:
            continue
        names = directions(config)
        drawn = figures.influence_errors(scores[scored], selections[stage], names, found.chance)
        caption = (
            f"Selected prompts of stage {stage} and as many that follow them in rank. Bars: one standard error to "
            "either side, from two halves of the prompt's trajectories. Last panel: dotted, a random draw. "
            f"At most {figures.MAX_BARS} prompts a panel, evenly spread, and {figures.MAX_SETS} sets are drawn."
        )
        return [Picture(drawn, caption)] if drawn else []
    return []


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
