"""Choices of a run: shares by source, overlap between stages; where influence chooses also beliefs and their cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np
import pyarrow as pa

from cropi.artifacts import is_finished
from cropi.config import Config
from cropi.report import figures
from cropi.report.blocks import Block, Table, Text
from cropi.report.costs import Charges, charges
from cropi.report.reading import Selection, read_beliefs, way
from cropi.report.wording import ABSENT, count, decimal, share, significant, tenths, with_error
from cropi.run_folder import RunFolder
from cropi.streams import read_jsonl

KINDS = 6  # kinds of prompt that are drawn
MEASURES = {
    "curriculum/seen": "share of the pool that was drawn at least once",
    "curriculum/share_read": "share of the squared gradient that is read",
    "curriculum/rows_dropped": "completions that were not found again in the backward pass",
    "curriculum/dropped": "measurements that were not finite",
}


# By validation set, kind of prompt and step: mean influence of the kind's prompts, and their mean standard error.
Beliefs = dict[str, dict[str, dict[int, tuple[float, float]]]]


def choosing(config: Config, run: RunFolder) -> list[Block]:
    """Belief, choice and cost, as far as the run has come."""
    steps, choices = config.train.steps_per_stage, read_jsonl(run.stages.choices)
    tables = {(stage + 1) * steps: table for stage, table in read_beliefs(config, run.stages).items()}
    if not is_finished(run.prompts):
        return []
    kind_of = dict(zip(run.train_prompts, run.train_prompts.column("source"), strict=True))
    metrics = {row["step"]: row for row in read_jsonl(run.stages.metrics)}
    blocks = [*_gain(metrics), *_belief(beliefs_by_kind(tables, kind_of), kind_of), *_places(choices, kind_of)]
    return [*blocks, *_measures(metrics), *_cost(charges(config, run.stages))]


# -- belief --------------------------------------------------------------------------------------------------------


def beliefs_by_kind(tables: Mapping[int, pa.Table], kind_of: Mapping[str, str]) -> Beliefs:
    """Mean influence of the prompts of each kind. Their mean standard error is at least the error of that mean."""
    found: Beliefs = {}
    for step, table in tables.items():
        kinds_N = np.array([kind_of[prompt_id] for prompt_id in table.column("prompt_id").to_pylist()])
        for column in table.column_names:
            name = column.removeprefix("influence/")
            if name == column or table.column(column).null_count:
                continue
            values_N, errors_N = (table.column(f"{part}/{name}").to_numpy() for part in ("influence", "standard_error"))
            for kind in np.unique(kinds_N).tolist():
                own_N = kinds_N == kind
                belief = float(values_N[own_N].mean()), float(errors_N[own_N].mean())
                found.setdefault(name, {}).setdefault(kind, {})[step] = belief
    return found


def _belief(found: Beliefs, kind_of: Mapping[str, str]) -> list[Block]:
    if not found:
        return []
    peak = dict.fromkeys(kind_of.values(), 0.0)
    for own in found.values():
        for kind, by_step in own.items():
            peak[kind] = max(peak[kind], *(abs(mean) for mean, _ in by_step.values()))
    kinds = sorted({kind for own in found.values() for kind in own}, key=lambda kind: (-peak[kind], kind))
    caption = (
        "Believed influence on each validation set, by kind of prompt: the mean over all prompts of the pool. "
        "Bands: ± their mean standard error, which is at least the error of the mean."
    )
    if len(kinds) > KINDS:
        caption += f" Only the {KINDS} kinds with the largest influence are drawn."
    drawn = figures.influence_by_kind(found, kinds[:KINDS], caption)
    steps = figures.thinned(sorted({step for own in found.values() for by_step in own.values() for step in by_step}))
    rows = [
        [kind, name, *(with_error(*own[kind][step]) if step in own.get(kind, {}) else ABSENT for step in steps)]
        for name, own in found.items()
        for kind in kinds
    ]
    header = ["kind of prompt", "validation set", *(f"step {step}" for step in steps)]
    return [drawn, Table("Believed influence ± standard error.", header, rows, left=2, collapsed=True)]


# -- choice --------------------------------------------------------------------------------------------------------


def places_by_kind(choices: Sequence[Mapping[str, Any]], kind_of: Mapping[str, str]) -> Columns:
    """Places in generation batches by kind of prompt and stage; a prompt that is drawn twice counts twice."""
    columns: Columns = {"pool": Counter(kind_of.values())}
    for batch in choices:
        places = columns.setdefault(f"stage {batch['stage']}", Counter())
        places.update(kind_of[prompt_id] for prompt_id in batch["prompt_ids"])
    return columns


def _places(choices: Sequence[Mapping[str, Any]], kind_of: Mapping[str, str]) -> list[Block]:
    if not choices:
        return []
    reasons = Counter(reason for batch in choices for reason in batch["why"])
    rows = [[way(why), count(number), share(number / reasons.total())] for why, number in reasons.most_common()]
    caption = "Places in the batches of every stage, by kind of prompt."
    return [
        share_table(places_by_kind(choices, kind_of), caption, "kind of prompt"),
        Table("Why a prompt got its place.", ["reason", "places", "share"], rows),
    ]


def _gain(metrics: Mapping[int, Mapping[str, float]]) -> list[Block]:
    """Help of a chosen group divided by that of a uniformly drawn one."""
    names = [f"curriculum/gain{end}" for end in ("", "_low", "_high")]
    known = {step: [row.get(name) for name in names] for step, row in metrics.items() if names[0] in row}
    if not known:
        return []
    step = max(known)
    gain, low, high = known[step]
    if low is None or high is None:
        text = (
            f"At step {step} the help of random prompts cannot be told from zero. "
            "How many times more chosen prompts help is therefore unknown."
        )
    else:
        text = (
            f"At step {step} a chosen prompt helps {decimal(gain)} times as much as a random one "
            f"(95 % interval: {decimal(low)} to {decimal(high)})."
        ) + (" A negative number means that one of the two hurts." if gain is not None and gain < 0 else "")
    bounded = {step: (gain, low, high) for step, (gain, low, high) in known.items() if None not in (gain, low, high)}
    caption = (
        "Help of a chosen prompt ÷ that of a random one, and its 95 % interval. Steps without bounds are left out."
    )
    drawn = figures.gain_of_choosing(bounded, caption)  # type: ignore[arg-type]
    return [Text(text), *([drawn] if drawn else [])]


def _measures(metrics: Mapping[int, Mapping[str, float]]) -> list[Block]:
    last = metrics[max(metrics)] if metrics else {}
    rows = [
        [MEASURES.get(name, name), significant(value)]
        for name, value in last.items()
        if name.startswith("curriculum/") and not name.startswith("curriculum/gain")
    ]
    return [Table("Other measures at the last step.", ["measure", "value"], rows, collapsed=True)] if rows else []


# -- cost ----------------------------------------------------------------------------------------------------------


def cost_rows(charged: Charges) -> list[list[str]]:
    """Seconds, and share of training's seconds and FLOPs, of everything beside training."""
    none = replace(charged, collected=(), entries=(), batches=(), steps=())
    train_s, train = charged.cost().train, replace(none, batches=charged.batches).flops(1).train
    scored = [entry for entry in charged.entries if entry["phase"] == "score"]
    own: dict[str, Charges] = {
        "validation completions": replace(none, collected=charged.collected),
        "validation gradients": replace(none, entries=[entry for entry in scored if "validation_tokens" in entry]),
        "representations": replace(none, entries=[entry for entry in scored if "forward_tokens" in entry]),
        "reading": replace(none, steps=charged.steps),
        "choosing": replace(none, entries=[entry for entry in charged.entries if entry["phase"] == "select"]),
    }
    spent = {
        what: (sum(entry["seconds"] for entry in (*part.collected, *part.entries)), part.flops(1).total)
        for what, part in own.items()
    }
    spent["all"] = sum(seconds for seconds, _ in spent.values()), sum(flops for _, flops in spent.values())
    return [
        [what, tenths(seconds), share(seconds / train_s if train_s else None), share(flops / train if train else None)]
        for what, (seconds, flops) in spent.items()
    ]


def _cost(charged: Charges) -> list[Block]:
    if not charged.entries:
        return []
    header = ["beside training", "seconds", "of training's seconds", "of training's FLOPs"]
    rows = cost_rows(charged)
    note = (
        f"Choosing costs {rows[-1][2]} of the seconds of training. Influence is read inside the training steps, and "
        "its seconds are part of training."
    )
    return [Table("Cost of choosing, beside training.", header, rows, strong=len(rows) - 1), Text(note)]


# -- shares by source, and overlap between stages ------------------------------------------------------------------

MAX_SOURCES = 20  # rows of a table by source

Columns = dict[str, Counter[str]]  # counts by source: of the pool, and of what was taken from it


def selected_sources(stages: Mapping[int, Selection]) -> Columns:
    """Prompts by source, in the pool and in every stage's selection. There is at least one stage."""
    pool = Counter(next(iter(stages.values())).sources)
    return {"pool": pool} | {f"stage {n}": Counter(compress(one.sources, one.selected)) for n, one in stages.items()}


def gathered(columns: Columns) -> Columns:
    """The sources with the largest shares anywhere, largest in the pool first, then all others together."""
    pool = columns["pool"]
    names = sorted(pool, key=lambda source: (-pool[source], source))
    if len(names) <= MAX_SOURCES:
        return {title: Counter({name: own[name] for name in names}) for title, own in columns.items()}
    peak = {name: max(own[name] / max(own.total(), 1) for own in columns.values()) for name in names}
    kept = {*sorted(names, key=lambda source: (-peak[source], source))[: MAX_SOURCES - 1]}
    rest = f"{len(names) - len(kept)} other sources"
    shown = [name for name in names if name in kept]
    return {
        title: Counter({name: own[name] for name in shown} | {rest: own.total() - sum(own[name] for name in shown)})
        for title, own in columns.items()
    }


def share_table(columns: Columns, caption: str, first: str = "source") -> Table:
    """Counts and shares as a table, darker where the share is larger."""
    columns = gathered(columns)
    shares = {title: {name: own[name] / max(own.total(), 1) for name in own} for title, own in columns.items()}
    sources = list(columns["pool"])
    rows = [[name, *(_counted(own[name], shares[title][name]) for title, own in columns.items())] for name in sources]
    peak = max(part for own in shares.values() for part in own.values()) or 1.0
    shades = [[None, *(own[name] / peak for own in shares.values())] for name in sources]
    rows.append(["all", *(count(own.total()) for own in columns.values())])
    return Table(caption, [first, *columns], rows, strong=len(rows) - 1, shades=shades)


def _counted(number: int, part: float) -> str:
    return f"{number:,} ({100 * part:.0f} %)" if number else "0"


def jaccard(stages: Mapping[int, Selection]) -> dict[int, float]:
    """|A ∩ B| / |A ∪ B| of each stage's selection with that of the stage before, by the later stage."""
    overlaps = {}
    for stage in sorted(stages):
        if stage - 1 in stages:
            before, now = stages[stage - 1].chosen, stages[stage].chosen
            overlaps[stage] = len(before & now) / len(before | now) if before | now else 1.0
    return overlaps


def random_jaccard(fraction: float) -> float:
    """The overlap to expect of two independent random draws of the same share α of a large pool: α / (2 − α)."""
    return fraction / (2 - fraction)
