"""A few prompts of the main arm's last selection, with what is known of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cropi.artifacts import OK, is_finished
from cropi.config import Config
from cropi.reporting.blocks import Block, Card, Text
from cropi.reporting.reading import read_completions, selection_table
from cropi.reporting.wording import ABSENT, decimal
from cropi.rewards.verifiers import CORRECT
from cropi.seeds import unit_interval
from cropi.workspace import Workspace

EACH = 3  # prompts from the top, from the bottom and at random; completions of a prompt
MAX_CHARACTERS = 2000  # of a prompt or completion

Row = Mapping[str, Any]  # of the selection table


def closeups(config: Config, space: Workspace) -> list[Block]:
    """Cards of the highest and lowest ranked prompts and of some drawn at random."""
    arm = next(iter(space.arms.values()))
    found = ((stage, selection_table(arm, stage)) for stage in reversed(range(config.train.stages)))
    stage, table = next(((stage, table) for stage, table in found if table is not None), (0, None))
    if table is None or not is_finished(space.prompts):
        return [Text("Nothing has been selected yet.")]
    chosen = pick(table.to_pylist(), config.seed)
    completions = read_completions(space, [row["prompt_id"] for rows in chosen.values() for row in rows])
    note = (
        f"From the last selection of `{arm.name}`, that of stage {stage}. Completions and pass rates are those of the "
        "stored trajectories, that is, of the base policy."
    )
    prompts, ranked = space.train_prompts, len(table) - table.column("rank").null_count
    cards = [
        _card(kind, row, ranked, prompts.get(row["prompt_id"], {}), completions.get(row["prompt_id"], []))
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


def _card(kind: str, row: Row, ranked: int, prompt: Row, completions: Sequence[Row]) -> Card:
    facts = [
        ("rank", ABSENT if row["rank"] is None else f"{row['rank']} of {ranked:,} ranked"),
        ("selected", "yes" if row["selected"] else "no"),
        ("status", row["status"]),
        ("pass rate", decimal(row["pass_rate"])),
        *((f"influence on {name}", _number(value)) for name, value in row["scores"]),
        ("source", row["source"]),
        ("prompt id", row["prompt_id"]),
        *([("reason", row["reason"])] if row["reason"] else []),
    ]
    texts = [("prompt", _prompt(prompt)), ("gold answer", shortened(prompt.get("answer", "")))]
    texts += [(_label(shown), shortened(shown["completion"])) for shown in telling(completions)]
    return Card(kind, facts, texts)


def _label(completion: Row) -> str:
    label = f"sample {completion['sample']}: {completion['verdict']}"
    return label if completion["status"] == OK else f"{label}, {completion['status']}"


def _prompt(prompt: Row) -> str:
    if "messages" not in prompt:
        return ABSENT
    messages = json.loads(prompt["messages"])
    if isinstance(messages, str):
        return shortened(messages)
    return shortened("\n".join(f"[{turn['role']}] {turn['content']}" for turn in messages))


def shortened(text: str) -> str:
    """The text, or its beginning and how much is left out."""
    left_out = len(text) - MAX_CHARACTERS
    return text if left_out <= 0 else f"{text[:MAX_CHARACTERS]}… ({left_out:,} more characters)"


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}".replace("-", "−")
