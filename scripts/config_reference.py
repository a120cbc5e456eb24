"""Write docs/config.md from cropi.config; with --check, fail where the page is not what would be written."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, JsonValue
from pydantic_core import PydanticUndefined

from cropi import config
from cropi.builtin.families import FAMILIES, STYLES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"
INTRODUCTION = """# Config reference

One YAML file describes a run. `cropi recipes copy quickstart .` writes a complete one.

- `cropi run CONFIG key.path=value` replaces settings; a number is a place in a list (`prompts.train.0.count=50`).
- Unknown keys are refused.
- Numbers and booleans are those of YAML 1.2: `1e-4` is a number, and only `true` and `false` are booleans.
- On a command line a value is plain text (`verifier.marker=####`), unless it is a number, `true`, `false` or `null`, or
  begins with a quote or a bracket. Then it is YAML.

`make docs` generates this page from `src/cropi/config`.
"""


def tables_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for argument in get_args(annotation) for table in tables_in(argument)]


def sections(table: type[BaseModel], path: str, seen: dict[str, type[BaseModel]]) -> None:
    """All tables below a table, in reading order, by the path where they stand first."""
    if table in seen.values():
        return
    seen[path] = table
    for name, field in table.model_fields.items():
        inner = tables_in(field.annotation)
        for member in inner:
            label = f"{path}.{name}" if path else name
            if "type" in member.model_fields:
                label += f" (type: {get_args(member.model_fields['type'].annotation)[0]})"
            sections(member, label, seen)


NAMES = {str: "str", int: "int", float: "float", bool: "bool"}
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "pattern": "matching"}
BEYOND_USE = (1_000_000_000, 1e6, 1e-9)  # limits that only keep out what no machine could do


def type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words: `int >= 1`, `list of str`, `a or b`, `name -> list of tables with a type`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0], arguments[1:])
    if annotation in (Any, JsonValue):
        return "anything"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table with a `type`" if "type" in annotation.model_fields else "table"
    if origin is Literal:
        return " or ".join(f"`{a}`" for a in arguments)
    if origin is tuple:
        inner = [a for a in arguments if a is not Ellipsis]
        return f"list of {type_text(inner[0])}" if Ellipsis in arguments else f"[{', '.join(map(type_text, inner))}]"
    if origin is dict:
        return f"name -> {type_text(arguments[1])}"
    if arguments:
        return " or ".join(dict.fromkeys(type_text(a) for a in arguments if a is not type(None)))
    return " ".join([NAMES.get(annotation, str(annotation)), *bounds(metadata)])


def bounds(metadata: Sequence[Any]) -> list[str]:
    """The limits that pydantic keeps beside a type, on a field or nested in one."""
    found = []
    for item in metadata:
        found += bounds(getattr(item, "metadata", ()))
        shown = {sign: getattr(item, key) for key, sign in SIGNS.items() if getattr(item, key, None) is not None}
        found += [f"{sign} {value}" for sign, value in shown.items() if value not in BEYOND_USE]
    return found


def described(name: str, field: Any) -> str:
    """One setting as a list item: name, type, default, meaning."""
    if field.default is PydanticUndefined and field.default_factory is None:
        default = "required"
    elif isinstance(field.default, BaseModel):
        default = ""
    else:
        default = "unset" if field.default is None else f"`{json.dumps(field.default)}`"
    facts = ", ".join(filter(None, [type_text(field.annotation, field.metadata), default]))
    return f"- `{name}` ({facts}): " + " ".join((field.description or "").split())


def table_text(path: str, table: type[BaseModel], known: dict[str, str]) -> str:
    """One section. Settings that an earlier type at the same place has too are named, not described again."""
    place, _, kind = path.partition(" (type: ")
    lines, repeated = [], []
    for name, field in table.model_fields.items():
        if name == "type":
            continue
        line = described(name, field)
        if place + line in known:
            repeated.append(f"`{name}`")
        else:
            lines.append(line)
            if kind:
                known[place + line] = kind
    if repeated:
        lines.insert(0, f"- {', '.join(repeated)}: as above.")
    return "\n".join([f"## {f'`{path}`' if path else 'Top level'}\n\n{(table.__doc__ or '').strip()}\n", *lines, ""])


def families_text() -> str:
    """A table of the built-in problems."""
    rows = [
        f"| `{name}` | `{STYLES[name]}` | {family.default.min_length}–{family.default.max_length} | "
        f"{family.default.modulus or ''} | {(family.generate.__doc__ or '').strip()} |"
        for name, family in FAMILIES.items()
    ]
    head = "| family | style | length | modulus | problem |\n|---|---|---|---|---|"
    return "\n".join(["## Families of built-in problems\n", head, *rows, ""])


def page() -> str:
    seen: dict[str, type[BaseModel]] = {}
    sections(config.Config, "", seen)
    known: dict[str, str] = {}
    owned: dict[str, list[str]] = {}
    for key, where in config.OWNED_TRAINER_KEYS.items():
        owned.setdefault(where, []).append(f"`{key}`")
    refused = "\n".join(f"- {', '.join(keys)}: {where}" for where, keys in owned.items())
    tables = [table_text(path, table, known) for path, table in seen.items()]
    keys = f"## Keys that `trainer` refuses, and what to set instead\n\n{refused}\n"
    return "\n".join([INTRODUCTION, *tables, keys, families_text()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    arguments = parser.parse_args()
    text = page()
    if not arguments.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/config.md is out of date: run `make docs`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
