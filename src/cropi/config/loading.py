"""Load a Config from a recipe, a YAML file or a run's folder, with overrides. Errors name the key. Free of torch."""

from __future__ import annotations

import copy
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from cropi.config import Config, VerificationConfig, Verifier
from cropi.config.yaml_text import parse_argument, parse_yaml
from cropi.curriculum.strategies import STRATEGIES
from cropi.errors import ConfigError, hint

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120

RECIPES = Path(__file__).parents[1] / "recipes"
PRESETS = RECIPES / "presets.yaml"


def recipe_names() -> list[str]:
    """Names of the recipes in the package; one in a sub-folder is named `folder/recipe`."""
    found = RECIPES.rglob("*.yaml")
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in found if path != PRESETS)


def suite_names() -> list[str]:
    """Names of the recipes of the scenario suite, `suite/…`."""
    return [name for name in recipe_names() if name.startswith("suite/")]


def recipe_text(name: str) -> str:
    """The text of a recipe."""
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


TYPES = frozenset(get_args(table.model_fields["type"].annotation)[0] for table in STRATEGIES)
NAMES_STRATEGY = {"select", "select.strategy", "select.strategy.type"}  # overrides that may name a preset
Patch = Mapping[str, Any]
ConfigLike: TypeAlias = str | Path | Mapping[str, Any]
"""A recipe's name, a YAML file, the folder of a run, or the settings themselves."""


def load_config(given: ConfigLike, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe by name, or a YAML file or a run's folder by path; apply `key.path=value` overrides; validate.

    A file takes precedence over a recipe of the same name, a recipe over a folder. ConfigError names the faulty key and
    the closest valid one.
    """
    if isinstance(given, Mapping):
        return config_of(copy.deepcopy(dict(given)), "the settings", overrides)
    name_or_path = str(given)
    path = Path(os.path.expanduser(name_or_path))  # noqa: PTH111 - an unknown user is no error here
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        values, where = _read_settings(path), str(path)
    elif name_or_path in recipe_names():
        where = f"recipe {name_or_path}"
        values = _settings(recipe_text(name_or_path), where)
    elif path.is_dir():
        values, where = _read_run(path), str(path)
    else:
        raise ConfigError(
            f"there is no config file, no run and no recipe named {name_or_path!r}",
            fix=f"give a .yaml file, a run's folder or one of the recipes: {', '.join(recipe_names())}.",
        )
    return config_of(values, where, overrides)


def config_of(values: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> Config:
    """Apply `key.path=value` overrides to plain values, in place; validate."""
    select = values.get("select")
    if isinstance(select, dict) and any(override.partition("=")[0] in NAMES_STRATEGY for override in overrides):
        select.pop("name", None)  # of the strategy that is replaced
    for override in overrides:
        _apply_override(values, override)
    named = with_presets(values)
    if named != values:  # the command line takes precedence over a preset
        for override in overrides:
            if override.partition("=")[0] not in NAMES_STRATEGY:
                _apply_override(named, override)
    return validate_config(named, where)


def _settings(text: str, where: str) -> dict[str, Any]:
    values = parse_yaml(text, where)
    if not isinstance(values, dict):
        raise ConfigError("the config must be a mapping of settings", where=where, fix="see `cropi recipes copy`.")
    return values


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 ({error})", where=str(path), fix="save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"cannot be read ({error})", where=str(path), fix="check the path.") from None
    return _settings(text, str(path))


def _read_run(folder: Path) -> dict[str, Any]:
    """Read the config of a run's folder, which may have been moved since.

    The output folder of a TRL script counts too: it holds its curriculum's run, beside a model's config.json.
    """
    for place in (folder, folder / "run", folder / "_curriculum" / "run"):
        path = place / "config.json"
        values = _read_settings(path) if path.is_file() else {}
        name = values.get("name")
        if name is not None:
            folder = place
            break
    else:
        raise ConfigError("holds no config of a run", where=str(folder), fix="name the folder of a run.")
    place = folder if folder.name == name else folder.resolve()
    if place.name != name:
        raise ConfigError(f"the folder of the run {name!r} has another name", where=str(folder), fix="rename it back.")
    return values | {"run_dir": str(place.parent)}


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key.path=value`; a key may be a position in a list."""
    where = f"override {_short.repr(override)}"
    path, equals, text = override.partition("=")
    parts = path.split(".")
    if not equals or not all(parts):
        raise ConfigError("an override is written key.path=value", where=where, fix="for example seed=1.")
    target: Any = values
    select = values.get("select")
    if path.startswith("select.strategy.") and isinstance(select, dict) and isinstance(select.get("strategy"), str):
        select["strategy"] = {"type": select["strategy"]}  # a name alone stands for its table
    for part in parts[:-1]:
        target = target.setdefault(part, {}) if isinstance(target, dict) else target[_position(target, part, where)]
    if isinstance(target, dict):
        target[parts[-1]] = parse_argument(text, where)
    else:
        target[_position(target, parts[-1], where)] = parse_argument(text, where)


def _position(target: Any, part: str, where: str) -> int:
    if not isinstance(target, list):
        raise ConfigError(f"{target!r} is a single value, it has no key {part!r}", where=where, fix="shorten the key.")
    positions = [str(position) for position in range(len(target))]
    if part not in positions:
        raise ConfigError(f"{part!r} is no position in a list of {len(target)}", where=where, fix="count from 0.")
    return positions.index(part)


def validate_config(values: Mapping[str, Any], where: str) -> Config:
    """Validate plain values, in which presets may be named as strategies."""
    try:
        return Config.model_validate(with_presets(values))
    except ValidationError as error:
        raise _refused(error.errors(include_url=False), where) from None


def json_schema() -> dict[str, Any]:
    """JSON Schema of a config as it is written: strategies and presets may also be named alone."""
    schema = Config.model_json_schema()
    strategy = schema["$defs"]["SelectConfig"]["properties"]["strategy"]
    tables = {key: strategy.pop(key) for key in ("oneOf", "discriminator") if key in strategy}
    named = {"type": "object", "required": ["type"], "properties": {"type": {"enum": sorted({*presets()} - TYPES)}}}
    strategy["anyOf"] = [{"enum": sorted({*presets(), *TYPES})}, tables, named]
    return schema


def parse_verifier(kind: str, options: Sequence[str]) -> Verifier:
    """Make a verifier of its type and `key=value` settings from a command line."""
    values: dict[str, Any] = {"type": kind}
    for option in options:
        _apply_override(values, option)
    return verifier_of(values, "command line")


def verifier_of(values: Mapping[str, Any], where: str) -> Verifier:
    """Make a verifier of plain values. ConfigError for unknown types and settings."""
    return _table("verifier", Verifier, values, where)


def verification_of(values: Mapping[str, Any], where: str) -> VerificationConfig:
    """Make the verification settings of plain values. ConfigError for unknown settings."""
    return _table("verification", VerificationConfig, values, where)


def _table(name: str, kind: Any, values: Mapping[str, Any], where: str) -> Any:
    """Validate one table of a config; an error names its place in a config."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        problems = [{**problem, "loc": (name, *problem["loc"])} for problem in error.errors(include_url=False)]
        raise _refused(problems, where) from None


def _refused(problems: Sequence[Any], where: str) -> ConfigError:
    # pydantic also reports a list whose only entry is faulty as too short: report the entry alone.
    blamed = [p for p in problems if not any(q["loc"][: len(p["loc"])] == p["loc"] and q is not p for q in problems)]
    lines = dict.fromkeys(_explain(problem) for problem in blamed)
    return ConfigError("; ".join(lines), where=where, fix="see docs/config.md or `cropi recipes copy`.")


def _explain(problem: Any) -> str:
    """Describe a pydantic problem: the key, what is wrong with it, the closest valid spelling."""
    parts, kind = problem["loc"], problem["type"]
    shown, tables = _walk(parts)
    key = ".".join(shown) or "the config"
    if kind == "extra_forbidden":
        known = sorted({field for table in tables for field in table.model_fields})
        return f"unknown key {key} - {_hint(str(parts[-1]), known, 'keys here')}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "union_tag_not_found":
        return f"{key}.type is missing"
    if kind == "union_tag_invalid":
        options, tag = re.findall(r"'([^']+)'", problem["ctx"]["expected_tags"]), problem["ctx"]["tag"]
        options += presets() if "strategy" in parts else []
        return f"{key}.type is {tag!r}, which is unknown - {_hint(tag, options, 'types')}"
    if kind == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    quote = ", so quote it (on a command line in two kinds of quotes)" if kind == "string_type" else ""
    return f"{key} is {_short.repr(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]}{quote}"


def _hint(word: str, known: Sequence[str], noun: str) -> str:
    return hint(word, known, f"known {noun}: {', '.join(known)}")


def _walk(parts: Sequence[Any]) -> tuple[list[str], list[type[BaseModel]]]:
    """An error path as the user wrote it, without pydantic's union tags, and the tables that may hold its last key."""
    shown: list[str] = []
    tables: list[type[BaseModel]] = [Config]
    for index, part in enumerate(parts):
        tagged = [table for table in tables if _tag(table) == part]
        if tagged and index < len(parts) - 1:
            tables = tagged
            continue
        shown.append(str(part))
        inner = [m for t in tables if part in t.model_fields for m in _tables_in(t.model_fields[part].annotation)]
        if inner and index < len(parts) - 1:
            tables = inner
    return shown, tables


def _tag(table: type[BaseModel]) -> str | None:
    field = table.model_fields.get("type")
    return get_args(field.annotation)[0] if field else None


def _tables_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for argument in get_args(annotation) for table in _tables_in(argument)]


def presets() -> dict[str, dict[str, Any]]:
    """Read the package's presets by name: `about`, and `config`, the patch."""
    return dict(parse_yaml(PRESETS.read_text(encoding="utf-8"), PRESETS.name))


def preset(name: str, where: str) -> Patch:
    """Return the patch of a preset. `where` is the place of its name, for the ConfigError of an unknown name."""
    known = presets()
    if name not in known:
        listed = f"known: {', '.join(known)}"
        raise ConfigError(
            f"there is no strategy {name!r} - {hint(name, known, listed)}",
            where=where,
            fix="name presets, or YAML files that patch a config.",
        )
    return dict(known[name]["config"])


def with_presets(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config, with the preset that `select.strategy` names laid over them."""
    result = copy.deepcopy(dict(values))
    select: Any = result.get("select")
    strategy = select.get("strategy") if isinstance(select, dict) else None
    if isinstance(strategy, str):  # a name alone
        select["strategy"] = strategy = {"type": strategy}
    kind = strategy.get("type") if isinstance(strategy, dict) else None
    if not isinstance(strategy, dict) or not isinstance(kind, str) or kind in TYPES or kind not in presets():
        return result
    select["name"] = kind if select.get("name") is None else select["name"]
    patch = presets()[kind]["config"]
    own = {key: value for key, value in strategy.items() if key != "type"}
    patch["select"]["strategy"] = patch["select"]["strategy"] | own
    return merged(result, patch)


def merged(values: Mapping[str, Any], patch: Patch) -> dict[str, Any]:
    """Merge a patch into a mapping, key by key.

    A table with a `type` replaces the earlier table, whose settings may belong to another type.
    """
    result = dict(values)
    for key, value in patch.items():
        before = result.get(key)
        whole = not isinstance(value, Mapping) or not isinstance(before, Mapping) or "type" in value
        result[key] = value if whole else merged(before, value)  # type: ignore[arg-type]
    return result
