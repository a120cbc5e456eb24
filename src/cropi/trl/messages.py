"""Translate messages of a run for a TRL script: `collect.temperature` becomes `args.temperature`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from cropi import console
from cropi.config import Config
from cropi.errors import UserError

# Arguments of a script, by the table that an error names.
WHOLE = {"policy": "model", "prompts": "the prompts", "verifier": "Verified", "trainer": "args"} | {
    name: f'Selector.settings["{name}"]' for name in ("collect", "score", "select")
}
# Arguments of a script, by setting.
ARGUMENTS = {
    "policy.path": "model",
    "policy.device": "model",
    "policy.dtype": "args.bf16",
    "policy.lora": "peft_config",
    "prompts.train": "train_dataset",
    "prompts.validation": "Selector.validation",
    "select.strategy": "Selector.strategy",
    "train.steps_per_stage": "args.max_steps",
} | {f"collect.{name}": f"args.{name}" for name in ("num_generations", "max_completion_length", "temperature")}
PHRASES = {  # regular expressions of command-line advice, and the script's equivalent
    "go on with `cropi run`|run the same command again|run `cropi [a-z]+` first": "run the script again",
    "start the run under another name|give the run another name|(choose )?another (name= or )?run_dir=": (
        "give another Selector.folder"
    ),
    r" \(name=\.\.\.\)| \(`cropi [a-z-]+` tells more\)| \(disjoint hash_range values split one file\)": "",
    r"prompts\.system_prompt or the messages, or set prompts\.chat=false": "the messages or the chat template",
    "see in `cropi check` how": "see in the stored trajectories how",
    "run_dir": "Selector.folder",
    "the verifier": "the reward function",
    "graded: true": "graded=True",
    " or `cropi recipes copy`": "",
    "name presets, or YAML files that patch a config": "name a preset, or give a mapping of settings",
}
_TABLES = {name: field.annotation for name, field in Config.model_fields.items()}
_KEY = re.compile(rf"(?<![\w./-])({'|'.join(_TABLES)})((?:\.[A-Za-z0-9_-]+)+)(=[\w-]+)?")


def in_script(text: str) -> str:
    """Translate a message of a run for the user of a script."""
    for phrase, other in PHRASES.items():
        text = re.sub(phrase, other, text)
    return _KEY.sub(_argument, text)


def reworded(error: UserError) -> UserError:
    """Translate an error for the user of a script."""
    where = WHOLE.get(error.where) or in_script(error.where)
    return type(error)(in_script(error.what), where=where, fix=in_script(error.fix))


@contextmanager
def worded() -> Iterator[None]:
    """Translate the messages and errors of the block."""
    with console.worded(in_script):
        try:
            yield
        except UserError as error:
            raise reworded(error) from None


@contextmanager
def warnings_only() -> Iterator[None]:
    """Print of the block's messages the warnings alone."""
    with console.worded(lambda text: in_script(text) if text.startswith(console.WARNING) else ""):
        yield


def _argument(match: re.Match[str]) -> str:
    table, rest, given = match[1], match[2], match[3] or ""
    keys = rest[1:].split(".")
    if keys[0] not in getattr(_TABLES[table], "model_fields", {keys[0]: None}):
        return match[0]  # the name of a file, say
    value = given and f"={_literal(given[1:])}"
    if table == "trainer":
        return f"args.{keys[0]}{value}"
    named = ARGUMENTS.get(f"{table}.{keys[0]}")
    if named is not None:
        return named + value
    place = "verification" if table == "verification" else f'Selector.settings["{table}"]'
    return place + "".join(f'["{key}"]' for key in keys) + value


def _literal(value: str) -> str:
    """Write a YAML value in Python."""
    python = {"true": "True", "false": "False", "null": "None"}
    return python.get(value) or (value if re.fullmatch(r"[\d.e-]+", value) else f'"{value}"')
