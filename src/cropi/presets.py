"""Presets: named strategies, each with the config patch that makes it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from cropi.curriculum.strategies import STRATEGIES
from cropi.errors import ConfigError, hint
from cropi.yaml_text import parse_yaml

PRESETS = Path(__file__).parent / "recipes" / "presets.yaml"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Patch = Mapping[str, Any]

# What pairs the runs: the same for every strategy.
COMMON = ("name", "run_dir", "seed", "policy", "prompts", "verifier", "verification", "evaluate")


def presets() -> dict[str, dict[str, Any]]:
    """Read the package's presets by name: `about`, and `config`, the patch."""
    return dict(parse_yaml(PRESETS.read_text(encoding="utf-8"), PRESETS.name))


TYPES = frozenset(get_args(table.model_fields["type"].annotation)[0] for table in STRATEGIES)


def read_patches(names: Sequence[str]) -> dict[str, Patch]:
    """Read patches of presets by name, and of YAML files by path (named by their stem)."""
    patches = dict[str, Patch]()
    for given in names:
        in_file = given.endswith((".yaml", ".yml"))
        name, patch = _from_file(Path(given)) if in_file else (given, preset(given, "--strategies"))
        if name in patches:
            raise ConfigError(f"{name} is named twice", where="--strategies", fix="name it once.")
        patches[name] = patch
    return patches


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


def _from_file(path: Path) -> tuple[str, Patch]:
    try:
        patch = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read ({error})", where=str(path), fix="check the path.") from None
    if not isinstance(patch, dict):
        raise ConfigError("a strategy is a mapping of settings", where=str(path), fix="see docs/compare.md.")
    if not NAME.fullmatch(path.stem) or path.stem.startswith("shared-"):
        raise ConfigError(
            "the file's name cannot name a strategy",
            where=str(path),
            fix="use letters, digits, '.', '_' and '-', and do not begin with shared-.",
        )
    return path.stem, patch


def patched(values: Mapping[str, Any], patch: Patch, name: str) -> dict[str, Any]:
    """Patch a config with a strategy. Raises ConfigError for a setting that must be the same in all runs."""
    for key in COMMON:
        if key in patch:
            raise ConfigError(
                f"a strategy cannot set {key}: it is the same for all that are compared",
                where=f"strategy {name}",
                fix="leave it out, or give it as key=value for all.",
            )
    return merged(values, patch)


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
