"""`cropi init` and `cropi schema`: the first config, from a look at the data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cropi.cli.shell import Overrides
from cropi.errors import DataError, UserError

SCHEMA_FILE = ".cropi-schema.json"
HELD_OUT = {"validation": (32, 0.2), "test": (128, 0.3)}  # rows that are enough, and the largest share of the file
POLICY = "Qwen/Qwen2.5-0.5B-Instruct"
ASKED_FOR = {"math": r"\boxed", "gsm8k": "####", "exact": "Answer:"}  # what a prompt must ask for

DataFile = Annotated[Path | None, typer.Option(help="File of that set.", show_default="a share of DATA")]


def init(
    data: Annotated[Path, typer.Argument(help="Prompts and answers: .jsonl, .json, .csv or .parquet.")],
    overrides: Overrides = None,
    validation: DataFile = None,
    test: DataFile = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write.", show_default="DATA's name, ending in .yaml")
    ] = None,
) -> None:
    """Look at a data file and write a config for it, to edit."""
    from cropi.config.loading import config_of
    from cropi.config.yaml_text import parse_yaml
    from cropi.prompts import checked_prompts

    values, seen = _proposed(data, {"validation": validation, "test": test})
    config_of(values, str(data), overrides or [])
    path = output or Path(f"{values['name']}.yaml")
    text = _yaml(values)
    found = checked_prompts(config_of(parse_yaml(text, str(path)), str(path)))
    write_config(path, text)
    sets = [row["set"].partition("/")[0] for row in found.rows]
    print(f"{data}: {seen}")
    for name, file in {"train": data, "validation": validation, "test": test}.items():
        held_out = " of the same file, held out by hash" if file is None else ""
        print(f"  {name:<11} {sets.count(name)} rows{held_out}")
    print(f"  verifier    {values['verifier']['type']}\n  policy      {values['policy']['path']}")
    print("\n".join([*(f"warning: {line}" for line in found.warnings), f"{path}\nnext: cropi check {path}"]))


def schema() -> None:
    """Print the JSON Schema of configs, for editors."""
    from cropi.config.loading import json_schema

    print(json.dumps(json_schema(), indent=2))


def write_config(path: Path, text: str) -> None:
    """Write a config with the schema that editors complete and check it by; nothing is overwritten."""
    from cropi.config.loading import json_schema

    if path.exists():
        raise UserError("exists already", where=str(path), fix="choose another name; nothing is overwritten.")
    try:
        path.write_text(f"# yaml-language-server: $schema={SCHEMA_FILE}\n{text}", encoding="utf-8")
        path.with_name(SCHEMA_FILE).write_text(json.dumps(json_schema()) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror})", where=str(path), fix="choose another folder."
        ) from None


def _proposed(data: Path, files: dict[str, Path | None]) -> tuple[dict[str, Any], str]:
    """The settings for a data file, and what was seen in it."""
    from cropi.config import FileSource
    from cropi.prompts.data_files import raw_rows
    from cropi.prompts.prompt_table import ANSWER_COLUMNS, PROMPT_COLUMNS

    rows = [row.values for row in raw_rows(FileSource(type="file", path=str(data)), "DATA")]
    columns = _columns(rows, data)
    prompts, answers = ([row[column] for row in rows if row.get(column)] for column in columns.values())
    verifier = _verifier([str(answer) for answer in answers])
    usual = {"prompt": PROMPT_COLUMNS, "answer": ANSWER_COLUMNS}
    unusual = {f"{what}_column": name for what, name in columns.items() if name not in usual[what]}
    source = {"type": "file", "path": str(data), **unusual}
    taken, held_out = 0.0, {}
    for name, (enough, most) in HELD_OUT.items():
        share = math.ceil(min(enough / len(rows), most) * 1000) / 1000
        part = {"hash_range": [taken, round(taken + share, 3)]} if files[name] is None else {"path": str(files[name])}
        held_out[name] = [source | part]
        taken = round(taken + share, 3) if files[name] is None else taken
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", data.stem).strip("-._") or "run"
    asked = ASKED_FOR.get(verifier["type"])
    told = asked is None or all(asked in str(prompt) for prompt in prompts)
    values = {
        "name": name,
        "policy": {"path": POLICY},
        "prompts": {
            "train": [source | ({"hash_range": [taken, 1.0]} if taken else {})],
            "validation": {name: held_out["validation"]},
            "test": {name: {"sources": held_out["test"]}},
            **({} if told else {"system_prompt": _request(verifier["type"])}),
        },
        "verifier": verifier,
        "collect": {"max_completion_length": 1024 if verifier["type"] == "math" else 256},
        "select": {"strategy": "cropi"},
        "train": {"stages": 4, "steps_per_stage": 16},
        "trainer": {"per_device_train_batch_size": 64, "learning_rate": 1e-6, "loss_type": "dr_grpo", "beta": 0.0},
    }
    form = "chat" if isinstance(prompts[0], list) else "text"
    seen = f"{len(rows)} rows, prompt in {columns['prompt']!r} ({form}), answer in {columns['answer']!r}"
    return values, seen


def _columns(rows: Sequence[dict[str, Any]], data: Path) -> dict[str, str]:
    """The columns of prompt and answer: by their usual names, else the longest and the shortest texts."""
    from cropi.prompts.prompt_table import ANSWER_COLUMNS, PROMPT_COLUMNS

    filled: dict[str, list[int]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str | int | float | list) and value not in ("", []):
                filled.setdefault(name, []).append(len(str(value)))
    by_length = sorted(filled, key=lambda name: sum(filled[name]) / len(filled[name]))
    if len(by_length) < 2:
        raise DataError("has no two columns for prompts and answers", where=str(data), fix="write one of each a row.")
    prompt = next((name for name in PROMPT_COLUMNS if name in filled), by_length[-1])
    others = [name for name in by_length if name != prompt]
    return {"prompt": prompt, "answer": next((name for name in ANSWER_COLUMNS if name in filled), others[0])}


def _verifier(answers: Sequence[str]) -> dict[str, str]:
    """The verifier that fits the form of the recorded answers."""
    from cropi.rewards.verifiers.numeric import value_of

    if all("####" in answer for answer in answers):
        return {"type": "gsm8k"}
    if all(value_of(answer.strip()) is not None for answer in answers):
        return {"type": "numeric"}
    if any(re.search(r"\\[a-zA-Z]|[$^_{}]", answer) for answer in answers):
        return {"type": "math"}
    return {"type": "exact", "marker": ASKED_FOR["exact"]}


def _request(verifier: str) -> str:
    """Tell the policy the form of an answer that the verifier reads."""
    form = {"math": r"in \boxed{}", "gsm8k": "after ####", "exact": f"after {ASKED_FOR['exact']!r}"}[verifier]
    return f"Think step by step. Write the final answer {form}."


def _yaml(values: dict[str, Any]) -> str:
    """A line per table, and a line per set of prompts."""
    lines = []
    for key, value in values.items():
        inner = [f"  {name}: {_flow(part)}" for name, part in value.items()] if key == "prompts" else []
        lines += [f"{key}:", *inner] if inner else [f"{key}: {_flow(value)}"]
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()
