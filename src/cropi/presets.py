"""Presets: named strategies, each with the config patch that makes it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from cropi.curriculum.strategies import STRATEGIES
from cropi.errors import ConfigError, hint
from cropi.yaml_text import parse_yaml

PRESETS = Path(__file__).parent / "recipes" / "presets.yaml"

Patch = Mapping[str, Any]


def presets() -> dict[str, dict[str, Any]]:
    """Read the package's presets by name: `about`, and `config`, the patch."""
    return dict(parse_yaml(PRESETS.read_text(encoding="utf-8"), PRESETS.name))


TYPES = frozenset(get_args(table.model_fields["type"].annotation)[0] for table in STRATEGIES)


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
    select = result.get("select")
    strategy = _table(select.get("strategy")) if isinstance(select, dict) else None
    if isinstance(select, dict) and strategy is not None:
        select["strategy"] = strategy
    named = _named(strategy)
    if named is None:
        return result
    own_name = result["select"].get("name")
    result["select"]["name"] = named if own_name is None else own_name
    return merged(result, _patch_of(named, strategy))


def _table(strategy: Any) -> Any:
    """Write a strategy given as a name alone as a table."""
    return {"type": strategy} if isinstance(strategy, str) else strategy


def _named(strategy: Any) -> str | None:
    """Return the preset that a strategy's type names, if any."""
    kind = strategy.get("type") if isinstance(strategy, dict) else None
    return kind if isinstance(kind, str) and kind not in TYPES and kind in presets() else None


def _patch_of(name: str, table: Any) -> dict[str, Any]:
    """The patch of a preset, with the further settings of the table that names it."""
    patch = presets()[name]["config"]
    own = {key: value for key, value in table.items() if key != "type"}
    patch["select"]["strategy"] = patch["select"]["strategy"] | own
    return patch


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
