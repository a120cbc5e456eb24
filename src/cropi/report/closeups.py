"""A few prompts of the last selection, with all that the run knows of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from cropi.artifacts import OK, is_finished
from cropi.config import Config
from cropi.report.blocks import Block, Card, Text
from cropi.report.reading import prompt_text, read_completions, rows_of, selection_table
from cropi.report.wording import ABSENT, NOT_MEASURED, decimal, with_error
from cropi.rewards.verdicts import CORRECT
from cropi.run_folder import RunFolder
from cropi.seeds import unit_interval

EACH = 3  # prompts from the top, from the bottom and at random; completions of a prompt
MAX_CHARACTERS = 2000  # of a prompt or completion

Row = Mapping[str, Any]  # of the selection table


def closeups(config: Config, run: RunFolder, scores: Mapping[int, pa.Table]) -> list[Block]:
    """Cards of the highest and lowest ranked prompts and of some drawn at random; `scores`: influence by stage."""
    found = ((stage, selection_table(run.stages, stage)) for stage in reversed(range(config.train.stages)))
    stage, table = next(((stage, table) for stage, table in found if table is not None), (0, None))
    if table is None or not is_finished(run.prompts):
        return [Text("Nothing has been selected yet.")]
    chosen = pick(table.to_pylist(), config.seed)
    ids = [row["prompt_id"] for rows in chosen.values() for row in rows]
    completions, scored = read_completions(run, ids), scores.get(config.select.strategy.scored_stage(stage))
    facts = rows_of(scored, ids) if scored is not None else {}
    note = f"From the last selection, that of stage {stage}. Completions and pass rates: the stored trajectories." + (
        " Influence stands with its standard error." if facts else ""
    )
    prompts, ranked = run.train_prompts, len(table) - table.column("rank").null_count
    cards = [
        Card(
            kind,
            _facts(row, ranked, facts.get(row["prompt_id"], {})),
            _texts(prompts.get(row["prompt_id"], {}), completions.get(row["prompt_id"], [])),
        )
        for kind, rows in chosen.items()
        for row in rows
    ]
    return [Text(note), *cards]


def pick(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """The top, the bottom and random ones, none twice. What the strategy could not rank may be drawn at random."""
    ranked = sorted((row for row in rows if row["rank"] is not None), key=lambda row: (row["rank"], row["prompt_id"]))
    top = ranked[:EACH]
    bottom = ranked[EACH:][-EACH:]
    shown = {row["prompt_id"] for row in (*top, *bottom)}
    rest = [row for row in rows if row["prompt_id"] not in shown]
    rest.sort(key=lambda row: (unit_interval(seed, "report", row["prompt_id"]), row["prompt_id"]))
    return {"highest ranked": top, "lowest ranked": bottom, "at random": rest[:EACH]}


def telling(completions: Sequence[Row]) -> list[Row]:
    """Up to EACH completions: the first right one and the first wrong one, then the others as they were sampled."""
    right = [row for row in completions if row["verdict"] == CORRECT][:1]
    wrong = [row for row in completions if row["verdict"] != CORRECT][:1]
    others = [row for row in completions if row not in (*right, *wrong)]
    return [*right, *wrong, *others][:EACH]


def _facts(row: Row, ranked: int, scored: Row) -> list[tuple[str, str]]:
    signal = scored.get("status", row["status"]) == OK
    influence = [
        (f"influence on {name}", with_error(value, scored.get(f"standard_error/{name}")) if signal else ABSENT)
        for name, value in row["scores"]
    ]
    return [
        ("rank", ABSENT if row["rank"] is None else f"{row['rank']} of {ranked:,} ranked"),
        ("selected", "yes" if row["selected"] else "no"),
        ("status", row["status"]),
        ("pass rate", decimal(row["pass_rate"])),
        *influence,
        *([("probability of being truly best", _chance(scored))] if influence else []),
        ("source", row["source"]),
        ("prompt id", row["prompt_id"]),
        *([("reason", row["reason"])] if row["reason"] else []),
    ]


def _chance(scored: Row) -> str:
    chance = scored.get("top_probability")
    return NOT_MEASURED if chance is None else decimal(chance)


def _texts(prompt: Row, completions: Sequence[Row]) -> list[tuple[str, str]]:
    text = shortened(prompt_text(prompt["messages"])) if prompt else ABSENT
    texts = [("prompt", text), ("gold answer", shortened(prompt.get("answer", "")))]
    return texts + [(_label(shown), shortened(shown["completion"])) for shown in telling(completions)]


def _label(completion: Row) -> str:
    label = f"sample {completion['sample']}: {completion['verdict']}"
    return label if completion["status"] == OK else f"{label}, {completion['status']}"


def shortened(text: str) -> str:
    """The text, or its beginning and how much is left out."""
    left_out = len(text) - MAX_CHARACTERS
    return text if left_out <= 0 else f"{text[:MAX_CHARACTERS]}… ({left_out:,} more characters)"
