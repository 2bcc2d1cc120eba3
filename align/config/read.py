"""YAML as people expect it.

PyYAML follows YAML 1.1, where ``5e-7`` is text, ``no`` is false, ``1:30`` is 90 and the second of two equal keys wins
without a word. Here numbers, booleans and null are those of YAML 1.2, and a repeated key is an error.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from align.errors import ConfigError


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own attribute

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is not text", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_WHOLE = r"[-+]?(?:0|[1-9][0-9]*)"
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", rf"^{_WHOLE}$", list("-+0123456789")),
    (
        "float",
        rf"^(?:(?:[-+]?\.[0-9]+|{_WHOLE}(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def parse_yaml(text: str, source: str) -> Any:
    """What ``text`` holds.

    Raises:
        ConfigError: not YAML, or a repeated key; with line and column in ``source``.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "YAML"
        what = ", ".join(part for part in (error.problem, error.context) if part)
        raise ConfigError(source, [(where, what)]) from None
    except yaml.YAMLError as error:
        raise ConfigError(source, [("YAML", " ".join(str(error).split()))]) from None


def parse_mapping(text: str, source: str) -> dict[str, Any]:
    """The mapping that ``text`` holds.

    Raises:
        ConfigError: not YAML, or something else than ``key: value`` lines.
    """
    found = parse_yaml(text, source)
    if not isinstance(found, dict):
        kind = "empty" if found is None else "a list" if isinstance(found, list) else "plain text"
        raise ConfigError(source, [("file", f"is {kind}; a recipe is made of 'key: value' lines")])
    return found
