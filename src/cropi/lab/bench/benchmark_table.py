"""Results of a benchmark as text."""

from __future__ import annotations

from typing import Any

from cropi.lab.bench.contender_list import CONTENDERS
from cropi.report.blocks import Table, text_table
from cropi.report.wording import ABSENT


def engine_text(result: dict[str, Any]) -> str:
    """The setup of a measurement, its table, and how to read it."""
    parts = [_heading(result), _table(result), *_notes(result)]
    return "\n\n".join(part for part in parts if part)


def _heading(result: dict[str, Any]) -> str:
    policy, work, settings = result["policy"], result["workload"], result["settings"]
    machine = result["environment"]
    place = machine["gpu"] or f"{machine['cpu']}, {settings['threads']} thread{'s' * (settings['threads'] > 1)}"
    return (
        f"{policy['shape']} ({policy['parameters']:,} parameters), {settings['dtype']}, {place}\n"
        f"workload {work['name']}: {work['prompts']} train prompts ({work['zero_share']:.0%} without signal), "
        f"{work['trajectories']} trajectories, {work['tokens_given_train']:,} tokens; "
        f"{work['validation_prompts']} validation prompts, {work['tokens_given_validation']:,} tokens; "
        f"{settings['rounds']} rounds, packs of {settings['batch_tokens']} tokens"
    )


def _table(result: dict[str, Any]) -> str:
    on_gpu = result["settings"]["device"] == "cuda"
    header = ["contender", "seconds", "given tok/s", "computed tok/s", "× floor", "× sketch", "RSS MB"]
    header += ["GPU MB"] if on_gpu else []
    header += ["start s", "Spearman", "P@10 %"]
    rows = []
    for row in result["contenders"]:
        if row["error"] is not None:
            rows.append([row["name"], "failed", *[ABSENT] * (len(header) - 2)])
            continue
        cells = [row["name"], _spread(row["seconds"], 2), _median(row["given_per_s"]), _median(row["computed_per_s"])]
        cells += [_spread(row["ratio_to_floor"], 2), _spread(row["seconds_to_sketch"], 2), _number(row["peak_rss_mb"])]
        cells += [_number(row["peak_gpu_mb"])] if on_gpu else []
        cells += [_number(row["startup_s"], 1), _number(row["spearman"], 3), _number(row["precision_at_10"], 2)]
        rows.append(cells)
    return text_table(Table("", header, rows))


def _number(value: float | None, digits: int = 0) -> str:
    return ABSENT if value is None else f"{value:,.{digits}f}"


def _median(value: dict[str, float] | None) -> str:
    return ABSENT if value is None else f"{value['median']:,.0f}"


def _spread(value: dict[str, float] | None, digits: int) -> str:
    if value is None:
        return ABSENT
    median, low, high = (f"{value[key]:,.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def _notes(result: dict[str, Any]) -> list[str]:
    names = [row["name"] for row in result["contenders"] if row["error"] is None]
    notes = [
        "Medians of the rounds (lowest–highest). Engines: train and validation prompts; floors: train prompts' tokens "
        "alone.\n× floor: seconds per computed token, of the train pass where it is timed apart; × sketch: seconds in "
        "all;\nboth round by round. Spearman, P@10 %: against `exact`, over prompts with signal."
    ]
    notes.append("\n".join(f"{name}: {CONTENDERS[name]}" for name in names))
    for row in result["contenders"]:
        if row["error"] is not None:
            notes.append(f"{row['name']} failed: {row['error']}")
    return notes
