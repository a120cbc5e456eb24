"""YAML text to plain values, and the values of command lines."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from cropi.errors import ConfigError

LARGEST_YAML = 100_000  # values in a text, those that an alias repeats counted each time


class _YamlLoader(yaml.SafeLoader):
    """YAML with the numbers and booleans of YAML 1.2: `1e-4` is a number, `on` is a string.

    Refuses tags, repeated keys, keys without a value, and aliases that lead back to themselves or multiply.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(
                None, None, "tags are not read: quote a text that begins with !", event.start_mark
            )
        node = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent):
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
            self._sizes[id(node)] = 1 + sum(self._sizes.get(id(part), 1) for part in parts)
            if self._sizes[id(node)] > LARGEST_YAML:
                raise yaml.composer.ComposerError(None, None, f"more than {LARGEST_YAML} values", event.start_mark)
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        return self.construct_object(node, deep=True)  # which refuses what contains itself

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a text", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if re.search("[\0\ud800-\udfff]", text):
            raise yaml.constructor.ConstructorError(
                None, None, "NUL and half a surrogate pair are no text", node.start_mark
            )
        return text

    def construct_null(self, node: yaml.ScalarNode) -> None:
        if not node.value:
            raise yaml.constructor.ConstructorError(
                None, None, "no value is given: write null, or quote a text that begins with # or &", node.start_mark
            )

    def construct_int(self, node: yaml.ScalarNode) -> int:
        try:
            return int(node.value)  # PyYAML itself reads a leading zero as octal
        except ValueError:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value)} digits", node.start_mark
            ) from None


_TAG = "tag:yaml.org,2002:"
_REPLACED = tuple(_TAG + name for name in ("float", "int", "bool", "timestamp", "value"))
_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in _REPLACED]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(_TAG + "bool", re.compile(r"^(?:true|false)$"), list("tf"))
_YamlLoader.add_implicit_resolver(_TAG + "int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_YamlLoader.add_implicit_resolver(
    _TAG + "float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+0123456789."),
)
_YamlLoader.add_constructor(_TAG + "null", _YamlLoader.construct_null)
_YamlLoader.add_constructor(_TAG + "int", _YamlLoader.construct_int)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; `where` names it in errors."""
    try:
        return yaml.load(text, Loader=_YamlLoader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
    except RecursionError:
        problem = "tables or lists stand too deep inside one another"
    raise ConfigError(f"not valid YAML: {problem}", where=where, fix="correct the line named.")


def parse_argument(text: str, where: str) -> Any:
    """The value of a command-line argument: YAML where it begins with a quote or a bracket, else a number, true, false,
    null or the text as it stands, whatever its characters mean in YAML."""
    bare = text.strip()
    if not bare:
        raise ConfigError("no value is given", where=where, fix="write null for none, \"''\" for an empty text.")
    plain = _YamlLoader("").resolve(yaml.ScalarNode, bare, (True, False))
    is_yaml = bare[0] in "'\"[{" or bare == "null" or plain in {_TAG + "bool", _TAG + "int", _TAG + "float"}
    return parse_yaml(text if is_yaml else json.dumps(text, ensure_ascii=False), where)
