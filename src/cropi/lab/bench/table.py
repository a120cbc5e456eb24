"""Results as text: tables that read well on a terminal and are Markdown as they stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cropi.lab.bench.lineup import CONTENDERS

MISSING = "–"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are as wide as their widest cell; the first column flush left, numbers right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ("-" if n == 0 else ":") for n, width in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def engine_text(result: dict[str, Any]) -> str:
    """The table of `cropi bench engine`, what it was measured on, and what its lines mean."""
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
    header += ["start s", "Spearman", "P@10 %", "of 2F"]
    rows = []
    for row in result["contenders"]:
        if row["status"] != "ok":
            rows.append([row["name"], row["status"], *[MISSING] * (len(header) - 2)])
            continue
        cells = [row["name"], _spread(row["seconds"], 2), _median(row["given_per_s"]), _median(row["computed_per_s"])]
        cells[2] = cells[2] if row["covers"] else MISSING
        cells += [_spread(row["ratio_to_floor"], 2), _spread(row["seconds_to_sketch"], 2), _number(row["peak_rss_mb"])]
        cells += [_number(row["peak_gpu_mb"])] if on_gpu else []
        share = row["share_of_2f_ceiling"]
        cells += [_number(row["startup_s"], 1), _number(row["spearman"], 3), _number(row["precision_at_10"], 2)]
        rows.append([*cells, MISSING if share is None else f"{share:.0%}"])
    return aligned(header, rows)


def _number(value: float | None, digits: int = 0) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"


def _median(value: dict[str, float] | None) -> str:
    return MISSING if value is None else f"{value['median']:,.0f}"


def _spread(value: dict[str, float] | None, digits: int) -> str:
    if value is None:
        return MISSING
    median, low, high = (f"{value[key]:,.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def _notes(result: dict[str, Any]) -> list[str]:
    names = [row["name"] for row in result["contenders"] if row["status"] == "ok"]
    notes = [
        "Medians of the rounds (lowest–highest). Engines: train and validation prompts; floors: train prompts' tokens "
        "alone.\n× floor: seconds per computed token, of the train pass where it is timed apart; × sketch: seconds in "
        "all;\nboth round by round. Spearman, P@10 %: against `exact`, over prompts with signal. of 2F: share of the "
        f"measured matrix-product rate\n({result['policy']['matmul_flops_per_s']:.3g} FLOP/s) if a token took two "
        "forward passes (`forward`: one)."
    ]
    notes.append("\n".join(f"{name}: {CONTENDERS[name].summary}{_dim(result, name)}" for name in names))
    for row in result["contenders"]:
        if row["status"] == "absent":
            notes.append(f"{row['name']} is not installed: {row['install']}{_how(row['name'])}")
        elif row["status"] == "failed":
            notes.append(f"{row['name']} failed: {row['error']}")
        notes += [f"{row['name']} warned: {warning}" for warning in row["warnings"]]
    profiled = {row["name"]: row["time_shares"] for row in result["contenders"] if row["time_shares"]}
    if profiled:
        kinds = list(next(iter(profiled.values())))
        rows = [[name, *(f"{shares[kind]:.0%}" for kind in kinds)] for name, shares in profiled.items()]
        notes.append(
            "where the time goes (train prompts, PyTorch's profiler):\n" + aligned(["contender", *kinds], rows)
        )
    grow = result["grow"]
    if grow is not None and grow["error"] is None:
        small, large = grow["prompts"]
        notes.append(
            f"memory of sketch: {grow['peak_rss_mb'][0]:,.0f} MB with {small} prompts, "
            f"{grow['peak_rss_mb'][1]:,.0f} MB with {large}: {grow['ratio']:.2f} times as much"
        )
    elif grow is not None:
        notes.append(f"memory of sketch could not be measured: {grow['error']}")
    return notes


def _dim(result: dict[str, Any], name: str) -> str:
    options = next(row["options"] for row in result["contenders"] if row["name"] == name)
    return f" (dim {options['dim']})" if "dim" in options else ""


def _how(name: str) -> str:
    return "\nthen give --bergson-python bergson-env/bin/python" if name == "bergson" else ""


def share_text(result: dict[str, Any]) -> str:
    """The terms of `cropi bench share`, and the share."""
    terms = aligned(
        ["term", "amount", "rate", "seconds"],
        [[term["name"], term["amount"], term["rate"], f"{term['seconds']['median']:,.0f}"] for term in result["terms"]],
    )
    shares = [
        f"{name}: {_percent(value)} of the training time" for name, value in result["share_of_training"].items()
    ] + [f"{name}: {_percent(value)} if sampling cost nothing" for name, value in result["share_of_updates"].items()]
    return "\n\n".join([result["heading"], terms, "\n".join(shares), "\n".join(result["assumptions"])])


def _percent(value: dict[str, float]) -> str:
    return f"{value['median']:.2%} ({value['low']:.2%}–{value['high']:.2%})"
