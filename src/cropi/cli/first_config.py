"""`cropi init` and `cropi schema`: the first config, from a look at the data."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cropi.cli.shell import Overrides
from cropi.errors import DataError, UserError, printable

if TYPE_CHECKING:
    from cropi.config import Config

SCHEMA_FILE = ".cropi-schema.json"
HELD_OUT = {"validation": (32, 0.2), "test": (128, 0.3)}  # rows that are enough, and the largest share of the file
POLICY, BUILTIN = "Qwen/Qwen2.5-0.5B-Instruct", "builtin"
FORMS = ("exact", "numeric", "gsm8k", "boxed", "math")
ASKED_FOR = {"math": r"\boxed", "gsm8k": "####", "exact": "Answer:"}  # what a prompt must ask for

DataFile = Annotated[Path | None, typer.Option(help="File of that set.", show_default="a share of DATA")]


def init(
    data: Annotated[
        Path | None, typer.Argument(help="Prompts and answers: .jsonl, .json, .csv or .parquet. Unset: you are asked.")
    ] = None,
    overrides: Overrides = None,
    validation: DataFile = None,
    test: DataFile = None,
    verifier: Annotated[
        str | None,
        typer.Option(help="A verifier, or MODULE.FUNCTION of your own.", show_default="by the form of the answers"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write.", show_default="DATA's name, ending in .yaml")
    ] = None,
) -> None:
    """Look at a data file and write a config for it, to edit. In a terminal, ask what the file does not tell."""
    from cropi.config.loading import config_of
    from cropi.config.yaml_text import flow_yaml, parse_yaml
    from cropi.prompts import checked_prompts, require_pairs

    look = _look(data, verifier or _named("verifier.type", overrides), _named("policy.path", overrides))
    values = _proposed(look, {"validation": validation, "test": test})
    config_of(values, str(look.data), overrides or [])
    path = output or Path(f"{values['name']}.yaml")
    text = _yaml(values)
    config = config_of(parse_yaml(text, str(path)), str(path))
    found = checked_prompts(config)
    require_pairs(config, found.rows)
    failure = _failure(config, found.rows[0])
    write_config(path, text)
    sets = [row["set"].partition("/")[0] for row in found.rows]
    print(printable(f"{look.data}: {look}"))
    for name, file in {"train": look.data, "validation": validation, "test": test}.items():
        held_out = " of the same file, held out by hash" if file is None else ""
        print(f"  {name:<11} {sets.count(name)} rows{held_out}")
    print(printable(f"  verifier    {flow_yaml(values['verifier'])}\n  policy      {values['policy']['path']}"))
    warnings = [f"warning: {line}" for line in [*found.warnings, *look.warnings(), *failure]]
    print(printable("\n".join([*warnings, str(path), f"next: cropi check {path}"])))


def _failure(config: Config, row: Mapping[str, Any]) -> list[str]:
    """Say how the verifier fails on a recorded answer, or that it cannot be loaded."""
    from cropi.rewards.pool import judge_of
    from cropi.rewards.verifier import answered

    completion = config.verifier.completion_with(row["answer"])
    try:
        note = judge_of(config.verifier, config.verification)([answered(completion, row)])[0].note
    except UserError as error:
        note = str(error)
    return [f"the verifier fails on the first row: {note}"] if note else []


def schema() -> None:
    """Print the JSON Schema of configs, for editors."""
    from cropi.config.loading import json_schema

    print(json.dumps(json_schema(), indent=2))


def write_config(path: Path, text: str) -> None:
    """Write a config with the schema that editors complete and check it by; nothing is overwritten."""
    from cropi.config.loading import json_schema

    if path.exists():
        raise UserError("exists already", where=str(path), fix="name another file; nothing is overwritten.")
    try:
        path.write_text(f"# yaml-language-server: $schema={SCHEMA_FILE}\n{text}", encoding="utf-8")
        path.with_name(SCHEMA_FILE).write_text(json.dumps(json_schema()) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror})", where=str(path), fix="choose another folder."
        ) from None


# -- what the file and the person tell ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """A data file as it was seen, or as answers at the terminal say."""

    data: Path
    rows: Sequence[dict[str, Any]]
    prompt: str  # column
    answer: str
    verifier: dict[str, Any]
    policy: str
    name: str
    clear: bool  # whether the columns' names left no doubt, or a person has said them

    def __str__(self) -> str:
        form = "chat" if isinstance(self._filled(self.prompt)[0], list) else "text"
        return f"{len(self.rows)} rows, prompt in {self.prompt!r} ({form}), answer in {self.answer!r}"

    def _filled(self, column: str) -> list[Any]:
        return [row[column] for row in self.rows if row.get(column)]

    @property
    def request(self) -> str | None:
        """The instruction on the form of an answer that the verifier reads; None where every prompt has one."""
        asked = ASKED_FOR.get(self.verifier["type"])
        if asked is None or all(asked in str(prompt) for prompt in self._filled(self.prompt)):
            return None
        form = {"math": r"in \boxed{}", "gsm8k": "after ####", "exact": f"after {ASKED_FOR['exact']!r}"}
        return f"Think step by step. Write the final answer {form[self.verifier['type']]}."

    @property
    def folder(self) -> Path:
        """The folder of the policy's files, if it is here."""
        from cropi.builtin import POLICY_DIR

        return Path(POLICY_DIR if self.policy == BUILTIN else self.policy)

    @property
    def takes_system_prompt(self) -> bool:
        """False for a policy in a folder here that has no chat template."""
        settings = _json(self.folder / "tokenizer_config.json")
        return not settings or "chat_template" in settings or (self.folder / "chat_template.jinja").is_file()

    def completion_length(self) -> int:
        """Room for an answer, at most half the context of a policy in a folder here."""
        context = _json(self.folder / "config.json").get("max_position_embeddings", math.inf)
        return int(min(1024 if self.verifier["type"] == "math" else 256, context // 2))

    def warnings(self) -> list[str]:
        """Say what was guessed, and what the policy is not told."""
        found = [] if self.clear else ["the columns were guessed: check prompt_column and answer_column"]
        if self.request is None or self.takes_system_prompt:
            return found
        untold = f"{self.policy} has no chat template, so nothing asks for the answer's form. End the prompts with it"
        return [*found, untold]


def _look(data: Path | None, verifier: str | None, policy: str | None) -> _Look:
    """Look at the file. A terminal is asked for everything if no file is named, else for what is unclear.

    UserError where neither a file nor a terminal is there.
    """
    from cropi.config import FileSource
    from cropi.prompts.data_files import raw_rows

    terminal, everything = sys.stdin.isatty(), data is None
    if data is None:
        if not terminal:
            raise UserError("no data file is named", where="DATA", fix="name one: cropi init DATA.jsonl")
        data = Path(_ask("data file (.jsonl, .json, .csv, .parquet)"))
    rows = [_flat(row.values) for row in raw_rows(FileSource(type="file", path=str(data)), "DATA")]
    if not rows:
        raise DataError("holds no rows", where=str(data), fix="write one problem a row.")
    columns, clear = _columns(rows, data)
    if terminal and (everything or not clear):
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = {what: _ask(f"column of the {what}s", column, names) for what, column in columns.items()}
    answers = [str(row[columns["answer"]]) for row in rows if row.get(columns["answer"]) not in (None, "")]
    guess = _form(answers)
    if verifier is None and terminal and (everything or guess == "exact"):
        verifier = _ask(f"verifier ({', '.join(FORMS)}, or MODULE.FUNCTION of your own)", guess)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", data.stem).strip("-._") or "run"
    if terminal and everything:
        policy = policy or _ask("policy (a folder or a Hub id)", POLICY)
        name = _ask("name of the runs", name)
    settings = _settings(verifier or guess)
    return _Look(data, rows, **columns, verifier=settings, policy=policy or POLICY, name=name, clear=clear or terminal)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the answer that verl's files keep in an object."""
    nested = row.get("reward_model")
    answer = nested.get("ground_truth") if isinstance(nested, dict) else None
    return row if answer is None else row | {"reward_model.ground_truth": answer}


def _ask(question: str, default: str | None = None, known: Sequence[str] = ()) -> str:
    names = {printable(name): name for name in (*known, *([] if default is None else [default]))}
    shown = None if default is None else printable(default)
    while (given := names.get(said := typer.prompt(printable(question), default=shown), said)) not in known and known:
        print(f"one of: {', '.join(map(printable, known))}")
    return str(given)


def _named(key: str, overrides: Sequence[str] | None) -> str | None:
    """The value that an override gives a setting."""
    return next((text.removeprefix(f"{key}=") for text in overrides or [] if text.startswith(f"{key}=")), None)


def _settings(verifier: str) -> dict[str, Any]:
    """A verifier by its name, or the function of that path, whose rewards are used as they are."""
    if "." in verifier:
        return {"type": "function", "path": verifier, "graded": True}
    return {"type": verifier, "marker": ASKED_FOR["exact"]} if verifier == "exact" else {"type": verifier}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not here, or not a policy's: `check` loads it and tells
        return {}
    return found if isinstance(found, dict) else {}


def _columns(rows: Sequence[dict[str, Any]], data: Path) -> tuple[dict[str, str], bool]:
    """The columns of prompt and answer: by their usual names, else the longest and the shortest texts.

    The second value is whether the names left no doubt.
    """
    from cropi.prompts.prompt_table import ANSWER_COLUMNS, PROMPT_COLUMNS

    filled: dict[str, list[int]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str | int | float | list) and value not in ("", []):
                filled.setdefault(name, []).append(len(str(value)))
    texts = {name: {str(row.get(name)) for row in rows} for name in filled}
    varied = [name for name in filled if len(texts[name]) > 1]  # a constant is neither prompt nor answer
    by_length = sorted(varied if len(varied) > 1 else filled, key=lambda name: sum(filled[name]) / len(filled[name]))
    if len(by_length) < 2:
        raise DataError("has no two columns for prompts and answers", where=str(data), fix="write one of each a row.")
    prompts = [name for name in PROMPT_COLUMNS if name in filled]
    prompt = (prompts or by_length[::-1])[0]
    answers = [name for name in ANSWER_COLUMNS if name in filled and name != prompt]
    answer = (answers or [name for name in by_length if name != prompt])[0]
    return {"prompt": prompt, "answer": answer}, len(prompts) == len(answers) == 1


def _form(answers: Sequence[str]) -> str:
    """The verifier that fits the form of the recorded answers."""
    from cropi.rewards.verifiers.numeric import value_of

    if not answers:
        return "exact"
    if all("####" in answer for answer in answers):
        return "gsm8k"
    if all(value_of(answer.strip()) is not None for answer in answers):
        return "numeric"
    return "math" if any(re.search(r"\\[a-zA-Z]|[$^_{}]", answer) for answer in answers) else "exact"


# -- what is written ---------------------------------------------------------------------------------------------------


def _proposed(look: _Look, files: dict[str, Path | None]) -> dict[str, Any]:
    """The settings for a data file; a share of it stands for the sets that have none."""
    from cropi.prompts.prompt_table import ANSWER_COLUMNS, PROMPT_COLUMNS

    there = {name for row in look.rows for name in row}
    wanted = {"prompt_column": (look.prompt, PROMPT_COLUMNS), "answer_column": (look.answer, ANSWER_COLUMNS)}
    unusual = {
        key: name for key, (name, usual) in wanted.items() if name != next(filter(there.__contains__, usual), "")
    }
    source = {"type": "file", "path": str(look.data), **unusual}
    taken, held_out = 0.0, {}
    for name, (enough, most) in HELD_OUT.items():
        share = math.ceil(min(enough / len(look.rows), most) * 1000) / 1000
        part = {"hash_range": [taken, round(taken + share, 3)]} if files[name] is None else {"path": str(files[name])}
        held_out[name] = [source | part]
        taken = round(taken + share, 3) if files[name] is None else taken
    told = {"system_prompt": look.request} if look.request and look.takes_system_prompt else {}
    return {
        "name": look.name,
        "policy": {"path": look.policy},
        "prompts": {
            "train": [source | ({"hash_range": [taken, 1.0]} if taken else {})],
            "validation": {look.name: held_out["validation"]},
            "test": {look.name: {"sources": held_out["test"]}},
            **told,
        },
        "verifier": look.verifier,
        "collect": {"max_completion_length": look.completion_length()},
        "select": {"strategy": "cropi"},
        "train": {"stages": 4, "steps_per_stage": 16},
        "trainer": {
            "per_device_train_batch_size": 64,
            "learning_rate": 4e-5 if look.policy == BUILTIN else 1e-6,
            "loss_type": "dr_grpo",
            "beta": 0.0,
        },
    }


def _yaml(values: dict[str, Any]) -> str:
    """A line per table, and a line per set of prompts."""
    from cropi.config.yaml_text import flow_yaml

    lines = []
    for key, value in values.items():
        inner = [f"  {name}: {flow_yaml(part)}" for name, part in value.items()] if key == "prompts" else []
        lines += [f"{key}:", *inner] if inner else [f"{key}: {flow_yaml(value)}"]
    return "\n".join(lines) + "\n"
