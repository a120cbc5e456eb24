"""Translate messages of a run for a TRL script: `collect.temperature` becomes `args.temperature`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from cropi import console
from cropi.config import Config
from cropi.errors import UserError

TABLES = {name: field.annotation for name, field in Config.model_fields.items()}
SETTINGS = ("collect", "score", "select")  # tables that a script gives in `Selector.settings`
ARGUMENTS = {  # of a script, by setting or table of the config
    "policy": "model",
    "policy.path": "model",
    "policy.device": "model",
    "policy.dtype": "args.bf16",
    "policy.lora": "peft_config",
    "prompts": "the prompts",
    "prompts.train": "train_dataset",
    "prompts.validation": "Selector.validation",
    "select.strategy": "Selector.strategy",
    "train.steps_per_stage": "args.max_steps",
    "trainer": "args",
    "verifier": "Verified",
    "collect.num_generations": "args.num_generations",
    "collect.max_completion_length": "args.max_completion_length",
    "collect.temperature": "args.temperature",
} | {name: f'Selector.settings["{name}"]' for name in SETTINGS}
PHRASES = {  # regular expressions of command-line advice, and the script's equivalent
    "go on with `cropi run`|run the same command again|run `cropi [a-z]+` first": "run the script again",
    "(name its own config|change them back in) .*?, or give the new run another name": (
        "delete the folder, or give another Selector.folder"
    ),
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
_KEY = re.compile(rf"(?<![\w./-])({'|'.join(TABLES)})((?:\.[A-Za-z0-9_-]+)+)(?:=([\w-]+))?")


def in_script(text: str) -> str:
    """Translate a message of a run for the user of a script."""
    for phrase, other in PHRASES.items():
        text = re.sub(phrase, other, text)
    return _KEY.sub(_argument, text)


def reworded(error: UserError) -> UserError:
    """Translate an error for the user of a script."""
    where = ARGUMENTS.get(error.where) or in_script(error.where)
    return type(error)(in_script(error.what), where=where, fix=in_script(error.fix))


@contextmanager
def worded(*, warnings_only: bool = False) -> Iterator[None]:
    """Translate the messages and errors of the block, and print of its messages all or the warnings."""
    with console.worded(lambda text: "" if warnings_only and not text.startswith(console.WARNING) else in_script(text)):
        try:
            yield
        except UserError as error:
            raise reworded(error) from None


def _argument(match: re.Match[str]) -> str:
    table, keys, value = match[1], match[2][1:].split("."), match[3]
    if keys[0] not in getattr(TABLES[table], "model_fields", {keys[0]: None}):
        return match[0]  # the name of a file, say
    known = ARGUMENTS.get(f"{table}.{keys[0]}")
    if known is None and table == "trainer":
        known = f"args.{keys[0]}"
    if known is None:
        place = "verification" if table == "verification" else f'Selector.settings["{table}"]'
        known = place + "".join(f'["{key}"]' for key in keys)
    if value is None:
        return known
    python = {"true": "True", "false": "False", "null": "None"}.get(value, value)
    given = python if python != value or re.fullmatch(r"[\d.e-]+", value) else f'"{value}"'
    if not known.startswith("Selector.settings"):
        return f"{known}={given}"
    path = "".join(f'{{"{key}": ' for key in (table, *keys))  # as an argument, which can be pasted
    return f"Selector(settings={path}{given}{'}' * (len(keys) + 1)})"
