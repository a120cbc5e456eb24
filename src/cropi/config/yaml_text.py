"""YAML text to plain values, and the values of command lines.

PyYAML reads YAML 1.1; this loader reads its numbers and booleans as YAML 1.2 does.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from cropi.errors import ConfigError


class _YamlLoader(yaml.SafeLoader):
    """YAML with the numbers and booleans of YAML 1.2: `1e-4` is a number, `on` is a string.

    Refuses tags, aliases, repeated keys and keys without a value.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        mark = event.start_mark
        if getattr(event, "tag", None) is not None:
            raise ComposerError(None, None, "tags are not read: quote a text that begins with !", mark)
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "aliases are not read: quote a text that begins with *", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConstructorError(None, None, "a key must be a text", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConstructorError(None, None, f"the key {key!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")  # an emoji is a pair in JSON
        if re.search("[\0\x7f\ud800-\udfff]", text):  # DEL: JSON writes it as it is, and YAML does not read that
            raise ConstructorError(None, None, "a text cannot hold NUL, DEL or half a surrogate pair", node.start_mark)
        return text

    def construct_null(self, node: yaml.ScalarNode) -> None:
        if not node.value:
            fix = "write null, or quote a text that begins with # or &"
            raise ConstructorError(None, None, f"no value is given: {fix}", node.start_mark)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        try:
            return int(node.value)  # PyYAML itself reads a leading zero as octal
        except ValueError:
            raise ConstructorError(None, None, f"a number of {len(node.value)} digits", node.start_mark) from None


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


class _YamlDumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or 1.2 would take for something else: `on` in the one, `08` in the other."""


_YamlDumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *pairs]
    for first, pairs in _YamlLoader.yaml_implicit_resolvers.items()
}


def flow_yaml(value: Any) -> str:
    """Write values on one line, which `parse_yaml` reads back."""
    options: dict[str, Any] = {"default_flow_style": True, "width": math.inf}
    text = yaml.dump(value, Dumper=_YamlDumper, sort_keys=False, allow_unicode=True, **options)
    return str(text).removesuffix("...\n").strip()


def parse_yaml(text: str, where: str) -> Any:
    """Parse a YAML text; `where` names it in errors."""
    try:
        return yaml.load(text, Loader=_YamlLoader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
    except RecursionError:
        problem = "tables or lists are nested too deep"
    raise ConfigError(f"not valid YAML: {problem}", where=where, fix="correct the line named.")


def parse_argument(text: str, where: str) -> Any:
    """Parse a command-line value: YAML if it begins with a quote or a bracket, else a number, true, false, null or the
    text itself, whatever its characters mean in YAML."""
    bare = text.strip()
    if not bare:
        raise ConfigError("no value is given", where=where, fix="write null for none, \"''\" for an empty text.")
    plain = _YamlLoader("").resolve(yaml.ScalarNode, bare, (True, False))
    is_yaml = bare[0] in "'\"[{" or bare == "null" or plain in {_TAG + "bool", _TAG + "int", _TAG + "float"}
    return parse_yaml(text if is_yaml else json.dumps(text, ensure_ascii=False), where)
